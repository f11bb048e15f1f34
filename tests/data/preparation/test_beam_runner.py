"""Beam writes the same files as the local runner. Only launch/test_beam.sh installs Beam."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.data.preparation.prepare import prepare

has_beam = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not has_beam, reason="Apache Beam has an environment of its own")

WORDS = "river stone light water cloud mountain under over between slowly".split()
SETTINGS: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.1, "shard_tokens": 9_000}


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources in several pieces, one with a bad line."""
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 20_000)
    rng = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randrange(0, 200)))})
        for _ in range(200)
    ]
    lines[150] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text(" ".join(rng.choices(WORDS, k=500)))
    return [f"jsonl:{tmp_path}/a.jsonl", f"text:{tmp_path}/b.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@needs_beam
@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_beam_writes_the_same_files(specs: list[str], tmp_path: Path, mode: str) -> None:
    prepare(specs, tmp_path / "local", on_bad_line="skip", **SETTINGS)
    options = [
        "--runner=BundleBasedDirectRunner"
        if mode == "in_memory"
        else "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
        f"--direct_running_mode={mode}",
        "--direct_num_workers=2",
    ]
    prepare(
        specs,
        tmp_path / "beam",
        on_bad_line="skip",
        runner="beam",
        beam_options=options,
        **SETTINGS,
    )
    local = contents(tmp_path / "local")
    assert len(local) > 8
    assert contents(tmp_path / "beam") == local


@needs_beam
def test_what_an_earlier_start_did_is_not_done_again(
    specs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilellm_jax.data.preparation import assembly, parts

    prepare(specs, tmp_path / "local", on_bad_line="skip", **SETTINGS)
    encoded: list[int] = []
    encode, assemble = parts.PieceEncoder.encode, assembly.assemble

    def failing(*arguments: Any) -> Any:
        raise InterruptedError

    def counting(self: Any, task: Any, count: Any) -> Any:
        encoded.append(task.number)
        return encode(self, task, count)

    options = ["--runner=BundleBasedDirectRunner"]
    settings: dict[str, Any] = {"on_bad_line": "skip", "runner": "beam", **SETTINGS}
    monkeypatch.setattr(parts.PieceEncoder, "encode", counting)
    monkeypatch.setattr(assembly, "assemble", failing)
    with pytest.raises(Exception, match="InterruptedError"):
        prepare(specs, tmp_path / "beam", beam_options=options, **settings)
    pieces = len(encoded)
    assert pieces > 5
    monkeypatch.setattr(assembly, "assemble", assemble)
    prepare(specs, tmp_path / "beam", beam_options=options, **settings)
    assert len(encoded) == pieces
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


@needs_beam
def test_a_bad_line_stops_beam_too(specs: list[str], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"a\.jsonl, line 151"):
        prepare(
            specs,
            tmp_path / "beam",
            runner="beam",
            beam_options=["--runner=BundleBasedDirectRunner"],
            **SETTINGS,
        )


@pytest.mark.skipif(has_beam, reason="Apache Beam is installed")
def test_without_beam_it_says_what_to_install(specs: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"needs Apache Beam.*mobilellm-jax\[beam\].*--runner=local"
    ):
        prepare(specs, tmp_path / "beam", runner="beam", on_bad_line="skip", **SETTINGS)
