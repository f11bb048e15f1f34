"""The package opens an exported folder only if the folder is complete."""

import dataclasses
import json
from pathlib import Path

import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export import artifact
from mobilellm_jax.export.artifact import open_artifact, seal_artifact
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.export.runtime import ArtifactInfo

INFO = ArtifactInfo(
    format="gguf",
    file="model.gguf",
    precision="q8_0",
    model=ModelConfig(vocab_size=290, max_seq_len=64),
    loss=3.5,
    origin="runs/mine/checkpoints/7",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "exported")


def make(path: Path, info: ArtifactInfo = INFO) -> Path:
    path.mkdir()
    for name in ("model.gguf", "model.gguf.data", "tokenizer.model", "model_card.md"):
        (path / name).write_bytes(name.encode() * 9)
    seal_artifact(path, info)
    return path


def test_what_was_sealed_is_opened_by_folder_and_by_file(folder: Path) -> None:
    for path in (folder, folder / "model.gguf"):
        found = open_artifact(path)
        assert found.info == INFO and found.file == folder / "model.gguf"
        assert found.info.model.max_seq_len == 64
    # This list has the model's own files, without the tokenizer and the card.
    assert found.model_bytes == 9 * len("model.gguf" + "model.gguf.data")


@pytest.mark.parametrize("name", ["model.gguf", "tokenizer.model", "model_card.md"])
def test_damage_to_any_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} has SHA-256"):
        open_artifact(folder)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} has .* bytes, but its manifest says"):
        open_artifact(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        open_artifact(folder)


def test_other_folders_and_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist. Did you mean exported"):
        open_artifact(tmp_path / "exportd")
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        open_artifact(tmp_path)
    with pytest.raises(ValueError, match=r"the model file of .* is model.gguf"):
        open_artifact(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "pdf"}, "names the format 'pdf'"),
        ({"file": "other.gguf"}, "the model file 'other.gguf'"),
        ({"file": "../model.gguf"}, "must be one of the folder's"),
        ({"format": "hf", "file": ""}, "names the format 'hf'"),
        ({"precision": "q9"}, "names the precision 'q9'; --format=gguf has float32, bfloat16"),
        (
            {"model": {**dataclasses.asdict(INFO.model), "num_kv_heads": 4}},
            "model.num_heads=9 must",
        ),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    path = make(tmp_path / "bad", dataclasses.replace(INFO, **fields))
    with pytest.raises(ValueError, match=message):
        open_artifact(path)


def test_a_manifest_of_something_else_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "VERSION", 2)
    with pytest.raises(ValueError, match="has format version 1, and this program reads 2"):
        open_artifact(folder)
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(ValueError, match="damaged"):
        open_artifact(folder)


def test_a_runtime_that_is_not_installed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = dataclasses.replace(FORMATS["gguf"], run_packages=("no_such_library",))
    monkeypatch.setitem(FORMATS, "gguf", missing)
    with pytest.raises(ValueError, match=r"runs in no_such_library, which is not installed; pip"):
        open_artifact(folder).load()
