"""Every file in configs/ builds and matches its name and its header."""

import ast
from pathlib import Path

import pytest

from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.config import Config
from mobilellm_jax.paper.architectures import MOBILELLM

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def config_of(name: str) -> Config:
    (file,) = [file for file in CONFIGS if file.stem == name]
    return load_config(str(file))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_builds(file: Path) -> None:
    assert load_config(str(file)).data.path


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_header_says_how_and_what(file: Path) -> None:
    header = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert f"--config={file.relative_to(ROOT)}" in header
    assert {"Data:", "Run:", "Cost:", "Result:"} <= set(header.split())


@pytest.mark.parametrize("size", MOBILELLM)
def test_paper_config_is_the_paper(size: str) -> None:
    config = config_of(f"mobilellm_{size}")
    assert config.model == MOBILELLM[size]
    assert (config.optimizer, config.train) == (Config().optimizer, Config().train)


def test_quickstart_shows_the_papers_ideas() -> None:
    model = config_of("quickstart").model
    assert model.num_repeats == 2 and model.sharing == "immediate"
    assert model.num_kv_heads < model.num_heads
    assert model.tie_embeddings


def test_quickstart_makes_its_own_data() -> None:
    data = config_of("quickstart").data
    assert (data.path, data.source) == ("data/python_docs", "python_docs")
