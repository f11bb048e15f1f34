import contextlib
import errno
import io
import random
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mobilellm_jax.data.sources import files
from mobilellm_jax.data.sources import parquet as parquet_source
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, BadLineError, Document, stop
from tests.data.reading import read, texts


def write(path: Path, values: Any, rows: int = 1000, **options: Any) -> None:
    columns = values if isinstance(values, dict) else {"text": values}
    pq.write_table(pa.table(columns), path, row_group_size=rows, **options)


@pytest.mark.parametrize("seed", range(30))
def test_pieces_together_have_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(
        "mobilellm_jax.data.sources.source.PIECE_BYTES", rng.choice([1, 60, 300, 10_000])
    )
    monkeypatch.setattr(parquet_source, "_BATCH_BYTES", rng.choice([1, 50, 1000]))
    expected = []
    for name in ("a", "b", "c"):
        values = ["é" * rng.randrange(30) for _ in range(rng.randrange(20))]
        write(tmp_path / name, pa.array(values, pa.string()), rng.randrange(1, 8))
        expected += [
            Document(f"{tmp_path}/{name}, record {row}", value)
            for row, value in enumerate(values, 1)
        ]
    source = open_source(f"parquet:{tmp_path}/*", tmp_path)
    assert source.splits() == ("train",)
    assert read(source) == expected
    pieces = source.pieces("train")
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sum(piece.size_bytes for piece in pieces) == stored


def test_small_row_groups_share_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are divided by the uncompressed bytes of all columns, not by the compressed bytes."""
    values = [letter * 1000 for letter in "abcdefgh"]
    write(
        tmp_path / "a",
        {"noise": [b"n" * 3000] * 8, "text": values},
        1,
        use_dictionary=False,
        write_statistics=False,
    )
    source = open_source(f"parquet:{tmp_path}/a", tmp_path)
    for limit, shared in ((1, 1), (9000, 2), (17_000, 4), (33_000, 8)):
        monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", limit)
        assert [len(piece.where) for piece in source.pieces("train")] == [shared] * (8 // shared)
    assert texts(source) == values


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.binary(), pa.large_binary(), pa.binary_view()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)
def test_null_and_invalid_text_are_bad_records(tmp_path: Path, kind: Any) -> None:
    values = pa.array([b"a", "é".encode(), None, b"", b"b\xff"], pa.binary())
    if pa.types.is_dictionary(kind):
        array = values.dictionary_encode()
    elif kind in (pa.string_view(), pa.binary_view()):
        array = values.cast(pa.binary_view()).cast(kind, safe=False)
    else:
        array = values.cast(kind, safe=False)
    path = tmp_path / "a.parquet"
    write(path, array, rows=2)
    source = open_source(f"parquet:{path}", tmp_path)
    bad: list[BadLine] = []
    assert texts(source, on_bad=bad.append) == ["a", "é", ""]
    assert bad == [
        BadLine(str(path), 3, None, "column 'text' is null"),
        BadLine(
            str(path), 5, None, "byte 0xff at 1 of column 'text' is not UTF-8 (invalid start byte)"
        ),
    ]
    message = r"a\.parquet, record 3: column 'text' is null\. .*--on_bad_line=skip"
    with pytest.raises(BadLineError, match=message):
        texts(source)


def test_the_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, {"text": ["t"], "content": ["c"], "length": [1]})
    assert texts(open_source(f"parquet:{path}#content", tmp_path)) == ["c"]
    message = (
        rf"'parquet:{path}#%s': %s in {path}\. Name a text column with #FIELD; text columns: text, "
        r"content\."
    )
    with pytest.raises(
        ValueError, match=message % ("length", "column 'length' is int64, not text")
    ):
        texts(open_source(f"parquet:{path}#length", tmp_path))
    message += r" Did you mean content\?"
    with pytest.raises(ValueError, match=message % ("contents", "there is no column 'contents'")):
        texts(open_source(f"parquet:{path}#contents", tmp_path))


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"text\n" * 100)
    message = r"a\.parquet is not a Parquet file, or it is damaged: .*; download it again"
    with pytest.raises(ValueError, match=message):
        texts(open_source(f"parquet:{path}", tmp_path))
    write(path, ["a" * 1000, "b"], compression="gzip")
    source = open_source(f"parquet:{path}", tmp_path)
    pieces = source.pieces("train")
    content = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(content[:start] + b"\xee" * 40 + content[start + 40 :])
    with pytest.raises(ValueError, match=message):
        list(source.documents(pieces[0], lambda bad: None))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(source.documents(pieces[0], lambda bad: None))


@pytest.mark.parametrize(
    "damaged",
    [
        b"%\x02\x18\x04\x80ext%",  # a name that is not UTF-8
        # for three of these footers, the part about a column aborts PyArrow 26
        b"%\x00\x18\x04text%",
        b"%\x01\x18\x04text%",
        b"&\x02\x18\x04text%",
    ],
)
def test_footer_that_is_damaged(damaged: bytes, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["one", "two"])
    content, whole = (tmp_path / "a.parquet").read_bytes(), b"%\x02\x18\x04text%"
    assert content.count(whole) == 1
    (tmp_path / "a.parquet").write_bytes(content.replace(whole, damaged))
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file.*; download it"):
        read(open_source(f"parquet:{tmp_path}/*", tmp_path))


def test_rows_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", ["one", "two"], rows=1)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/x/a.parquet", (tmp_path / "a.parquet").read_bytes())
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 1)
    source = open_source("parquet:memory://x/*.parquet", tmp_path)
    assert len(source.pieces("train")) == 2
    assert read(source)[1] == Document("memory:///x/a.parquet, record 2", "two")
    memory.store.clear()


def test_footers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` asks for the pieces several times, and a footer may be read over a network."""
    write(tmp_path / "a", ["one"])
    source = open_source(f"parquet:{tmp_path}/a", tmp_path)
    pieces = source.pieces("train")
    monkeypatch.delattr(files, "opened")
    assert source.pieces("train") == pieces


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.randbytes(500).hex() for _ in range(16_000)]
    write(tmp_path / "a", values, rows=16_000, compression="none", use_dictionary=False)
    source = open_source(f"parquet:{tmp_path}/a", tmp_path)
    (piece,) = source.pieces("train")
    tracemalloc.start()  # what PyArrow reads from a file of ours is Python's
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for document in source.documents(piece, stop):
        count += len(document[1])
        most = max(most, pa.total_allocated_bytes() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 16_000_000
    assert 1_000_000 < most < 10_000_000


def test_the_disks_errors_are_not_the_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    write(tmp_path / "a", ["one"])
    source = open_source(f"parquet:{tmp_path}/a", tmp_path)
    monkeypatch.setattr(files, "opened", lambda *_: contextlib.closing(Broken(b"x" * 1000)))
    with pytest.raises(OSError, match="Input/output error") as error:
        source.pieces("train")
    assert error.value.errno == errno.EIO
