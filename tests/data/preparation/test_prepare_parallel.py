"""Workers, kills and restarts do not change the files that `prepare` writes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.data.preparation import prepare as prepare_module
from mobilellm_jax.data.preparation.prepare import prepare

WORDS = "river stone light water cloud mountain under over between slowly,".split()
WORDS += ["\u2581", "\u00e9\U0001f469", "\n"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Lines of JSON and text files, with empty documents and repeated ones."""
    rng = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(0, 200))) for _ in range(150)]
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate([*texts, texts[0]])]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for i in range(30):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 100)))
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def specs(corpus: Path) -> list[str]:
    return [f"jsonl:{corpus}/*.jsonl", f"text:{corpus}/*.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


SETTINGS: dict[str, Any] = {"vocab_size": 330, "validation_fraction": 0.1, "shard_tokens": 9_000}


def test_workers_and_pieces_change_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {}
    for name, workers, piece_bytes in (
        ("one", 1, 8_000_000),
        ("small", 1, 3_000),
        ("two", 2, 20_000),
    ):
        monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", piece_bytes)
        prepare(specs(corpus), tmp_path / name, workers=workers, **SETTINGS)
        outputs[name] = contents(tmp_path / name)
    assert len(outputs["one"]) > 10  # several shards of either split
    assert outputs["one"] == outputs["small"] == outputs["two"]


_PREPARE = """
import json, sys
from pathlib import Path
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.sources import source

if __name__ == "__main__":
    source.PIECE_BYTES = 8_000
    prepare(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=2, **json.loads(sys.argv[3]))
"""


@pytest.mark.parametrize("moments", [4, pytest.param(10, marks=pytest.mark.soak)])
def test_killed_at_random_moments(corpus: Path, tmp_path: Path, moments: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(_PREPARE)

    def start(output: Path) -> "subprocess.Popen[bytes]":
        arguments = [json.dumps(specs(corpus)), str(output), json.dumps(SETTINGS)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.Popen([sys.executable, script, *arguments], env=environment)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait(timeout=120) == 0
    whole_sec = time.monotonic() - began
    expected = contents(tmp_path / "whole")
    rng = random.Random(1)
    output, work = tmp_path / "killed", tmp_path / ".killed.preparing"
    kills, with_parts, completed = 0, 0, 0
    while kills < moments:
        process = start(output)
        before = len(list(work.glob("parts/*.json")))
        # Kill at a random moment. Imports take half of the time, so every second kill comes among
        # the parts.
        moment = whole_sec * rng.uniform(0.1, 1.0)
        if kills % 2:
            while process.poll() is None and len(list(work.glob("parts/*.json"))) <= before:
                time.sleep(0.002)
            moment = rng.uniform(0.0, 0.3)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            with_parts += any(work.glob("*/*.tokens")) if work.exists() else 0
            assert not output.exists() or contents(output) == expected
        else:
            completed += 1
        if output.exists():
            assert contents(output) == expected
            for file in output.iterdir():
                file.unlink()
            output.rmdir()
    assert start(output).wait(timeout=120) == 0
    assert contents(output) == expected
    assert not work.exists()
    print(f"{kills} kills, {with_parts} of them with parts to go on from, {completed} complete")
    assert with_parts >= moments // 4


def test_an_interrupted_start_goes_on_with_its_parts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    """A restart encodes no complete part again, and refuses other settings or sources."""
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 8_000)
    prepare(specs(corpus), tmp_path / "whole", workers=1, **SETTINGS)
    encode = prepare_module.encode_pieces
    encoded: list[int] = []

    def some(job: Any, tasks: Any, *arguments: Any) -> Any:
        for part in encode(job, tasks, *arguments):
            encoded.append(part.number)
            yield part
            if len(encoded) == 7:
                raise InterruptedError

    monkeypatch.setattr(prepare_module, "encode_pieces", some)
    with pytest.raises(InterruptedError):
        prepare(specs(corpus), tmp_path / "data", workers=1, **SETTINGS)
    with pytest.raises(ValueError, match="interrupted preparation with other settings .*0.1"):
        prepare(specs(corpus), tmp_path / "data", **{**SETTINGS, "validation_fraction": 0.3})
    prepare(specs(corpus), tmp_path / "data", workers=1, **SETTINGS)
    assert encoded == list(range(len(encoded)))  # each once
    assert any(f"7 of {len(encoded)} parts are complete" in line for line in log_lines)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_pieces_divided_in_another_way_are_not_mixed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise InterruptedError
        yield

    encode = prepare_module.encode_pieces

    def first(job: Any, tasks: Any, *arguments: Any) -> Any:
        yield next(encode(job, tasks, *arguments))
        raise InterruptedError

    monkeypatch.setattr(prepare_module, "encode_pieces", first)
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 8_000)
    with pytest.raises(InterruptedError):
        prepare(specs(corpus), tmp_path / "data", workers=1, **SETTINGS)
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 9_000)
    with pytest.raises(ValueError, match="divided the sources in another way"):
        prepare(specs(corpus), tmp_path / "data", workers=1, **SETTINGS)


def test_two_at_once_are_told_apart(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = prepare_module.train_tokenizer

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match=rf"by another prepare \(process {os.getpid()} on"):
            prepare(specs(corpus), tmp_path / "data", **SETTINGS)
        return train(*arguments)

    monkeypatch.setattr(prepare_module, "train_tokenizer", meanwhile)
    prepare(specs(corpus), tmp_path / "data", workers=1, **SETTINGS)
    assert (tmp_path / "data" / "manifest.json").is_file()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_stop_or_are_listed(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    log_lines: list[str],
) -> None:
    """A restart with --on_bad_line=skip keeps the parts that were encoded before the bad line."""
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 5_000)
    file = corpus / "b.jsonl"
    lines = file.read_text("utf-8").split("\n")
    lines[100] = '{"text": "cut off'
    lines[120] = '{"other": "field"}'
    file.write_text("\n".join(lines), "utf-8")
    offset = len("\n".join(lines[:100]).encode()) + 1 + len('{"text": "cut off')
    prepare(specs(corpus)[1:], tmp_path / "texts", workers=1, **SETTINGS)
    tokenizer = tmp_path / "texts" / "tokenizer.model"
    arguments: dict[str, Any] = {
        "workers": workers,
        "tokenizer": tokenizer,
        **SETTINGS,
        "vocab_size": None,
    }
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 101, byte {offset}"):
        prepare(specs(corpus), tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()
    manifest = prepare(specs(corpus), tmp_path / "data", on_bad_line="skip", **arguments)
    assert any("parts are complete" in line for line in log_lines)
    bad = manifest.sources[0].bad_lines
    assert [(line["file"], line["line"]) for line in bad] == [(str(file), 101), (str(file), 121)]
    assert bad[0]["byte_offset"] == offset
    assert any("WARNING: 2 bad lines were left out" in line for line in log_lines)
    documents = sum(counts.documents for counts in manifest.sources[0].splits.values())
    assert documents + manifest.sources[0].empty_documents == 302 - 2
    del lines[120], lines[100]
    file.write_text("\n".join(lines), "utf-8")
    clean = prepare(specs(corpus), tmp_path / "clean", **arguments)
    assert clean.splits == manifest.splits


def test_far_too_many_bad_lines(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "MOST_BAD_LINES", 20)
    (corpus / "wrong.jsonl").write_text("text\n" * 21)
    with pytest.raises(ValueError, match=r"more than 20 bad lines.*wrong\.jsonl"):
        prepare(specs(corpus), tmp_path / "data", on_bad_line="skip", workers=1, **SETTINGS)
