"""A run of a few seconds for the tests of faults."""

import dataclasses
from pathlib import Path

import pytest

from mobilellm_jax.config import Config
from tests import tiny

CONFIG = dataclasses.replace(
    tiny.RUN,
    model=dataclasses.replace(tiny.RUN.model, compute_dtype="float32", attention="xla"),
    train=dataclasses.replace(tiny.RUN.train, max_bad_steps=3),
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared_words(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def config(data: Path) -> Config:
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, path=str(data)))
