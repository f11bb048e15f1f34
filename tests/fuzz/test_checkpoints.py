"""Tests damaged checkpoint manifests, and false manifests with a right checksum.

Orbax has to refuse damage to its own files. Such damage does not reach this package's parser.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mobilellm_jax import checkpoint
from mobilellm_jax.checkpoint import folders
from mobilellm_jax.storage import sealing
from tests.checkpoint.test_checkpoint import CONFIG, DATA, filled, tokenizer
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz

__all__ = ["tokenizer"]  # the fixture


@pytest.fixture(scope="module")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(1, filled(CONFIG), DATA)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def use(run: Path) -> None:
    """Does what a start does with the manifest of the newest step."""
    step = checkpoint.latest_step(run)
    assert step == 1
    assert checkpoint.steps(run) == checkpoint.whole_steps(run) == [1]
    checkpoint.read_config(checkpoint.step_folder(run, step))
    checkpoint.can_resume(run, step)
    assert checkpoint.read_data_state(run, step).next_sample >= 0


def test_manifest_that_is_damaged(run: Path, tmp_path: Path) -> None:
    use(run)
    file = run / "checkpoints" / "1" / "manifest.json"
    valid = file.read_bytes()

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        if content != valid:
            assert checkpoint.whole_steps(run) == []
            folders.delete_old(epath.Path(run) / "checkpoints", 0, 0)  # deletes none that is not
            assert file.exists()
        use(run)

    inputs = st.one_of(damaged_bytes(valid), damaged_json(json.loads(valid)))
    fuzz(parse, inputs, tmp_path, valid=valid)


def test_manifest_that_is_sealed_on_purpose(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints" / "1" / "manifest.json"
    valid = json.loads(file.read_bytes())
    del valid["sha256"]

    def parse(content: bytes) -> None:
        try:
            changed = json.loads(content)
            file.write_text(sealing._text(changed))
        except (ValueError, TypeError, RecursionError):  # this value cannot be sealed
            file.write_bytes(content)
        use(run)

    counts = fuzz(parse, damaged_json(valid), tmp_path, valid=json.dumps(valid))
    assert counts["refused"] > counts["taken"], "little that is changed fits the files"
    file.write_text(sealing._text(valid))
    use(run)  # no step was deleted because of a manifest


def test_names_that_a_manifest_gives(run: Path, tmp_path: Path) -> None:
    folder = epath.Path(run / "checkpoints" / "1")
    valid = sealing.read_manifest(folder)
    names = [
        *("", ".", "..", "../1/manifest.json", "/etc/passwd", "params", "params/", "a\0b"),
        *("params/_METADATA/x", "x" * 300, "x/" * 3000, "\ud800", "manifest.json", "~", "C:\\x"),
        *("\x1b[2J", "params/../params/_METADATA", "gs://bucket/x", "//etc/passwd"),
        "/\0",  # cannot be read, and is not below the folder
    ]

    @st.composite
    def inputs(draw: DrawFn) -> dict[str, Any]:
        name = draw(st.one_of(st.sampled_from(names), st.text(max_size=20)))
        record = draw(st.sampled_from([*valid["files"].values(), {"bytes": 4096, "sha256": "0"}]))
        return {**valid, "files": {**valid["files"], name: record}}

    def parse(content: dict[str, Any]) -> None:
        (folder / sealing.MANIFEST).write_text(sealing._text(content))
        sealing.verify(folder, contents=False)
        use(run)

    counts = fuzz(parse, inputs(), tmp_path, valid=valid, share=0.5)
    assert not counts["taken"], "no file of the step has one of these names"
