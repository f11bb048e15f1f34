"""Returns a recipe whose runs take a moment."""

import dataclasses
from pathlib import Path

import pytest

from mobilellm_jax.config import Config, to_json
from tests import tiny

STEPS = 48
CONFIG = dataclasses.replace(
    tiny.RUN,
    train=dataclasses.replace(tiny.RUN.train, steps=STEPS, eval_every=24, keep_checkpoints=2),
    evaluate=dataclasses.replace(tiny.RUN.evaluate, every=24),
)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = str(tiny.prepared_words(tmp_path_factory.mktemp("text")))
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, path=path))


@pytest.fixture(scope="session")
def config_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "config.py"
    path.write_text(
        "from mobilellm_jax.config import from_json, to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(from_json({to_json(config)!r}))\n"
    )
    return path
