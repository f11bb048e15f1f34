"""Tests corpora: files of lines, compressed or not, and Parquet tables."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis.strategies import SearchStrategy

from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, stop
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz

LINES = b'{"text": "a\\u00e9"}\n\n{"text": "b", "n": [1]}\n{"text": ""}\n'


def read(spec: str, file: Path, content: bytes) -> tuple[int, list[BadLine]]:
    """Returns the number of documents in a file with this content, and its bad lines."""
    file.write_bytes(content)
    source = open_source(f"{spec}:{file}", file.parent / "scratch")
    documents, bad = 0, list[BadLine]()
    for piece in source.pieces("train"):
        for document in source.documents(piece, bad.append):
            assert document.name
            documents += 1
    return documents, bad


def fuzz_file(
    spec: str, name: str, inputs: SearchStrategy[bytes], folder: Path, valid: bytes
) -> None:
    def parse(content: bytes) -> None:
        _, bad = read(spec, folder / name, content)
        for line in bad:
            assert len(str(line)) < 2_000
            stop(line)

    fuzz(parse, inputs, folder, valid=valid)


@pytest.mark.parametrize(
    ("kind", "documents", "bad"), [("text", 1, 0), ("jsonl", 3, 0), ("tokens", 0, 3)]
)
def test_lines(kind: str, documents: int, bad: int, tmp_path: Path) -> None:
    found, lines = read(kind, tmp_path / "file", LINES)
    assert (found, len(lines)) == (documents, bad)
    valid = b'{"token_ids": [1]}\n' if kind == "tokens" else LINES
    fuzz_file(kind, "file", damaged_bytes(LINES), tmp_path, valid)


@pytest.mark.parametrize(
    ("kind", "record"),
    [("jsonl", {"text": "a", "n": [1]}), ("tokens", {"token_ids": [1, 2], "loss_mask": [0, 1]})],
)
def test_records(kind: str, record: object, tmp_path: Path) -> None:
    valid = json.dumps(record).encode()
    assert read(kind, tmp_path / "file", valid) == (1, [])
    fuzz_file(kind, "file", damaged_json(record), tmp_path, valid)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_compressed(kind: str, ending: str, tmp_path: Path) -> None:
    valid = gzip.compress(LINES * 3) if ending == ".gz" else zstandard.compress(LINES * 3)
    documents = 1 if kind == "text" else 9
    assert read(kind, tmp_path / f"file{ending}", valid) == (documents, [])
    fuzz_file(kind, f"file{ending}", damaged_bytes(valid), tmp_path, valid)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_parquet(compression: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "", "b" * 50, "é"], "n": [1, 2, 3, 4]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression=compression, row_group_size=2)
    assert read("parquet", tmp_path / "file.parquet", buffer.getvalue()) == (4, [])
    fuzz_file(
        "parquet", "file.parquet", damaged_bytes(buffer.getvalue()), tmp_path, buffer.getvalue()
    )
