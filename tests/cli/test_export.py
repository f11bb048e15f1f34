"""Tests that `mobilellm export` gives back the files that `mobilellm import` read."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.huggingface.directory import read_huggingface
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.open_model import open_model
from tests.huggingface import write_huggingface

CONFIG = ModelConfig(
    vocab_size=300,
    embed_dim=16,
    num_blocks=2,
    num_repeats=3,
    sharing="reverse",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_seq_len=64,
)
BLOCK_BYTES = 4 * (2 * 16 * 8 * (4 + 2) + 3 * 16 * 24 + 2 * 16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 290, folder / "x.model")
    params = init_params(CONFIG, jax.random.key(0))
    write_huggingface(CONFIG, params, tokenizer, folder / "source", layout="mobilellm")
    (folder / "source" / "model_card.md").unlink()  # it names where the model came from
    return folder / "source"


@pytest.fixture
def source(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "source")


def test_import_then_export_gives_the_files_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, back, plain = tmp_path / "run", tmp_path / "back", tmp_path / "plain"
    assert cli.main(["import", f"--source={source}", f"--output={run}"]) == 0
    out = capsys.readouterr().out
    assert "2 blocks, each applied 3 times (reverse)" in out and "float32" in out
    opened = open_model(run)
    assert opened.step == 0
    assert opened.config == read_huggingface(source).config

    flags = [f"--checkpoint={run}", "--format=mobilellm", f"--output={back}"]
    assert cli.main(["export", *flags]) == 0
    assert f"once: about {4 * BLOCK_BYTES:,} bytes less than" in capsys.readouterr().out
    assert "parameters | " in (back / "model_card.md").read_text()
    for file in source.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name

    assert cli.main(["export", f"--checkpoint={run}", f"--output={plain}"]) == 0
    out = capsys.readouterr().out
    assert f"about {4 * BLOCK_BYTES:,} bytes more than stored once" in out
    assert "greedy tokens equal: 32 of 32" in out
    assert "6 layers stored, 6 applied" in out
    assert json.loads((plain / "config.json").read_text())["model_type"] == "llama"


def test_export_of_a_huggingface_directory_in_bfloat16(source: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    flags = ["--format=mobilellm", "--dtype=bfloat16", f"--output={half}"]
    assert cli.main(["export", f"--checkpoint={source}", *flags]) == 0
    found, given = read_huggingface(half), read_huggingface(source)
    assert found.dtype == "bfloat16"
    exact = given.params["embedding"]["table"]
    np.testing.assert_allclose(found.params["embedding"]["table"], exact, rtol=2**-8)
    assert not np.array_equal(found.params["embedding"]["table"], exact)


def test_bad_input_has_a_message_and_makes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    full = f"--output={tmp_path}"
    for args, message in (
        (
            ["import", f"--source={tmp_path / 'no'}", f"--output={new}"],
            "is not a Hugging Face directory",
        ),
        (["import", f"--source={source}", full], "holds source; name a new folder"),
        (["export", f"--checkpoint={source}", full], "holds source; name a new folder"),
        (["export", f"--checkpoint={source}", "--format=pdf", f"--output={new}"], "hf|mobilellm"),
        (["export", f"--checkpoint={source}"], "--output is missing: folder to make"),
    ):
        assert cli.main(args) == 2
        assert message in capsys.readouterr().err
    tokenizer_sized = json.loads((source / "config.json").read_text()) | {"vocab_size": 280}
    (source / "config.json").write_text(json.dumps(tokenizer_sized))
    assert cli.main(["import", f"--source={source}", f"--output={new}"]) == 2
    assert "of another shape: model.embed_tokens.weight (300, 16), not (280, 16)" in (
        capsys.readouterr().err
    )
    assert not new.exists()


def test_import_of_a_gguf_file_names_the_extra_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm_jax.errors.importlib.util.find_spec", lambda name: None)
    file, run = tmp_path / "model.gguf", tmp_path / "run"
    assert cli.main(["import", f"--source={file}", f"--output={run}"]) == 2
    assert "needs the package gguf, which is not installed; pip install 'mobilellm-jax[gguf]'" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_a_tokenizer_larger_than_the_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    # The text of the fixture supports 290 tokens, and this text supports 310.
    texts = ["sphinx of black quartz, judge my vow; pack my box with five dozen liquor jugs"] * 9
    (source / "tokenizer.model").unlink()
    train_tokenizer(texts, 310, source / "tokenizer.model")
    assert cli.main(["import", f"--source={source}", f"--output={tmp_path / 'run'}"]) == 2
    assert "has 310 tokens, but the model has only model.vocab_size=300" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
