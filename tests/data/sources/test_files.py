import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from mobilellm_jax.data.sources import files, finding
from mobilellm_jax.data.sources.source import BadLineError
from mobilellm_jax.storage import decompression

SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """Returns an empty fsspec file system in the memory of this process."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def found(pattern: str) -> list[str]:
    return [file.path for file in finding.find("test", pattern)]


def write(path: Path, content: bytes) -> tuple[str, int]:
    path.write_bytes(content)
    return str(path), len(content)


def test_local_files_by_path(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.txt").mkdir()
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md", ".hidden.txt"):
        (tmp_path / name).write_bytes(name.encode())
    expected = [str(tmp_path / name) for name in ("a.txt", "b.txt", "deep/er/c.txt")]
    assert found(f"{tmp_path}/**/*.txt") == expected
    assert found(f"{tmp_path}/*.txt") == expected[:2]
    assert finding.find("test", expected[1]) == [
        finding.File(expected[1], 5, str(os.stat(expected[1]).st_mtime_ns))
    ]


def test_files_behind_a_url(tmp_path: Path, memory: MemoryFileSystem) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nb")
    (tmp_path / "folder.txt").mkdir()
    assert found(f"file://{tmp_path}/*.txt") == [f"file://{tmp_path}/a.txt"]
    memory.pipe({"/x/b.txt": b"bb", "/x/y/a.txt": b"c\nd\n", "/x/a.md": b""})
    listed = finding.find("test", "memory://x/**/*.txt")
    assert [(file.path, file.size_bytes) for file in listed] == [
        ("memory:///x/b.txt", 2),
        ("memory:///x/y/a.txt", 4),
    ]
    assert files.contents(listed[0].path, 2) == b"bb"
    for path, size in ((f"file://{tmp_path}/a.txt", 3), (listed[1].path, 4)):
        assert [offset for offset, _ in files.lines(path, size, 0, size)] == [0, 2]
        assert [offset for offset, _ in files.lines(path, size, 1, size)] == [2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/nothing.md", "'test': the pattern matches nothing"),
        ("{}", "matches folders only; add /"),
        ("file://{}/nothing.md", "matches nothing"),
        ("file://{}", "matches folders only"),
        ("memory://no/such/*.txt", "matches nothing"),
    ],
)
def test_a_pattern_without_files(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        finding.find("test", pattern.format(tmp_path))


def test_a_bucket_that_does_not_exist(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("NoSuchBucket")

    monkeypatch.setattr(MemoryFileSystem, "glob", missing)
    with pytest.raises(FileNotFoundError, match="'test': the pattern matches nothing"):
        finding.find("test", "memory://x/*")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftpp://a/*", "'test': Protocol not known: ftpp; fsspec knows .*memory"),
        ("undriven://a/*", "'test': Install drivefs, e.g. with pip"),
        ("zip://*.txt::file:///a.zip", "'test': chained URLs .* are not supported"),
    ],
)
def test_urls_that_cannot_be_opened(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = {"class": "no_such_package.DriveFileSystem", "err": "Install drivefs"}
    monkeypatch.setitem(known_implementations, "undriven", driver)
    with pytest.raises(ValueError, match=message):
        finding.find("test", url)


def test_a_server_that_does_not_tell_the_size(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = {"/x/a.txt": {"type": "file", "size": None}}
    monkeypatch.setattr(MemoryFileSystem, "glob", lambda *_, **__: listing)
    monkeypatch.setattr(MemoryFileSystem, "info", lambda _, path: listing[path])
    with pytest.raises(ValueError, match=r"'test': .* not tell the size of /x/a\.txt; download"):
        finding.find("test", "memory://x/*")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_identity_follows_names_sizes_and_times(tmp_path: Path, prefix: str) -> None:
    def identity() -> str:
        return finding.identity("kind", finding.find("test", f"{prefix}{tmp_path}/*.txt"))

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one")
        os.utime(tmp_path / name, (1e9, 1e9))
    before = identity()
    assert before == identity()
    assert before.startswith("kind, 2 files, 6 bytes, SHA-256 of names, sizes and times ")
    os.utime(tmp_path / "a.txt", (1e9, 1e9 + 1))
    later = identity()
    (tmp_path / "a.txt").write_text("four")
    os.utime(tmp_path / "a.txt", (1e9, 1e9))
    longer = identity()
    (tmp_path / "a.txt").write_text("one")
    os.utime(tmp_path / "a.txt", (1e9, 1e9))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert len({before, later, longer, identity()}) == 4


def test_identity_reads_no_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.delattr(files, "opened")
    monkeypatch.setattr("builtins.open", None)
    assert finding.identity("kind", finding.find("test", f"{tmp_path}/*.txt"))


def test_packing_keeps_order_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 10)
    text_bytes = [4, 6, 0, 1, 10, 11, 3, 3, 3, 3, 0]
    parts = [files.Part((i,), size, 100 + size) for i, size in enumerate(text_bytes)]
    pieces = files.pack("spec", parts)
    assert [[i for (i,) in piece.where] for piece in pieces] == [
        *([0, 1, 2], [3], [4], [5], [6, 7, 8], [9, 10])
    ]
    assert [piece.size_bytes for piece in pieces] == [310, 101, 110, 111, 309, 203]
    assert files.pack("spec", []) == []


def test_cuts_follow_each_other() -> None:
    for total, count in ((10, 3), (3, 3), (7, 1), (10**15 + 1, 4)):
        ranges = list(files.cuts(total, count))
        assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1], len(ranges)) == (0, total, count)
        lengths = [stop - start for start, stop in ranges]
        assert max(lengths) - min(lengths) <= 1
    assert list(files.cuts(0, 0)) == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_file_that_changed_is_not_read(tmp_path: Path, prefix: str) -> None:
    path, size = write(tmp_path / "a.txt", b"one\ntwo\n")
    assert files.contents(prefix + path, size) == b"one\ntwo\n"
    (tmp_path / "a.txt").write_bytes(b"one\n")
    message = r"a\.txt has 4 bytes now, and had 8 when it was listed"
    with pytest.raises(ValueError, match=message):
        files.contents(prefix + path, size)
    with pytest.raises(ValueError, match=message):
        next(files.lines(prefix + path, size, 4, 8))


def random_content(rng: random.Random) -> bytes:
    """Writes lines shorter and longer than a piece, many of them empty."""
    lines = [rng.randbytes(rng.choice([0, 0, 1, 5, 90])) for _ in range(rng.randrange(12))]
    return b"\n".join(line.replace(b"\n", b".") for line in lines) + rng.choice([b"", b"\n"])


@pytest.mark.parametrize("seed", range(60))
def test_ranges_together_have_every_line_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = random_content(rng)
    path, size = write(tmp_path / "a", content)
    borders = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(9)))})
    read = [
        (offset, line)
        for start, stop in itertools.pairwise(borders)
        for offset, line in files.lines(path, size, start, stop)
    ]
    expected = naive_lines(content)
    assert [line for _, line in read] == expected
    assert all(content[offset:].startswith(line) for offset, line in read)
    assert [offset for offset, _ in read] == [
        sum(map(len, expected[:i])) for i in range(len(expected))
    ]


def naive_lines(content: bytes) -> list[bytes]:
    *ended, last = content.split(b"\n")
    return [line + b"\n" for line in ended] + ([last] if last else [])


def test_a_line_without_end_is_read_by_one_piece_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others look no further than to their own end for where a line starts."""
    content = b"x" * 50_000
    path, size = write(tmp_path / "a", content)
    assert list(files.lines(path, size, 0, 10_000)) == [(0, content)]
    read: list[int] = []

    class Counting(io.BytesIO):
        def readline(self, limit: int | None = -1, /) -> bytes:
            line = super().readline(limit)
            read.append(len(line))
            return line

    monkeypatch.setattr(files, "_BUFFER_BYTES", 1000)
    monkeypatch.setattr(files, "opened", lambda *_: contextlib.closing(Counting(content)))
    assert list(files.lines(path, size, 10_000, 20_000)) == []
    assert max(read) == 1000
    assert 10_000 <= sum(read) <= 11_000


def test_line_numbers_are_counted_onwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BUFFER_BYTES", 7)
    content = b"".join(b"%d\n" % i for i in range(200))
    path, size = write(tmp_path / "a", content)
    other, _ = write(tmp_path / "b", b"x" * size)
    starts = [offset for offset, _ in files.lines(path, size, 0, size)]
    numbers = files.LineNumbers()
    for index in (150, 3, 4, 199, 199, 0):
        assert numbers.at(path, size, starts[index]) == index + 1
    assert numbers.at(other, size, 50) == 1
    assert numbers.at(path, size, starts[100]) == 101
    # What it counted once it does not read again.
    numbers.at(path, size, starts[150])
    Path(path).write_bytes(b"x" * starts[150] + content[starts[150] :])
    assert numbers.at(path, size, starts[160]) == 161


Compress = Callable[[bytes], bytes]
FORMATS = ("gzip", "bzip2", "xz", "zstd")


def gzip_member(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zstd_frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def zstd_frame_of_unknown_size(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(content) + compressor.flush()


COMPRESSORS = pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip_member),
        (".zst", zstd_frame),
        (".zst", zstd_frame_of_unknown_size),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ],
)


@COMPRESSORS
@pytest.mark.parametrize("seed", range(15))
def test_compressed_members_are_one_text(
    tmp_path: Path, suffix: str, compress: Compress, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 2, 7, 1 << 15])
    monkeypatch.setattr(decompression, "_CHUNK_BYTES", dict.fromkeys(FORMATS, size))
    content = random_content(rng)
    borders = sorted({0, len(content), *(rng.randrange(len(content) + 1) for _ in range(3))})
    members = [compress(content[a:b]) for a, b in itertools.pairwise(borders)]
    members.insert(rng.randrange(len(members) + 1), compress(b""))
    padding = SKIPPABLE_FRAME if suffix == ".zst" else b"\0" * rng.choice([0, 100])
    path, size = write(tmp_path / f"a{suffix}", padding.join([*members, b""]))
    assert files.contents(path, size) == content
    read = list(files.lines(path, size, 0, size))
    assert [line for _, line in read] == naive_lines(content)
    assert all(content[offset:].startswith(line) for offset, line in read)


@COMPRESSORS
def test_wherever_a_compressed_file_is_cut_off_the_reading_stops(
    tmp_path: Path, suffix: str, compress: Compress
) -> None:
    content = b"".join(b"line %d\n" % (i * i) for i in range(30))
    whole = compress(content[:100]) + compress(content[100:])
    border = len(compress(content[:100]))
    for length in {*range(len(whole))} - {border}:  # there it looks complete
        path, size = write(tmp_path / f"a{suffix}", whole[:length])
        read = []
        message = rf"a{suffix}, line \d+, byte \d+: the file is cut off: .* The rest of the file"
        with pytest.raises(BadLineError, match=message) as error:
            for _, line in files.lines(path, size, 0, size):
                read.append(line)
        assert content.startswith(b"".join(read))
        assert f"line {len(read) + 1}, byte {len(b''.join(read))}:" in str(error.value)
        with pytest.raises(BadLineError, match=message):
            files.contents(path, size)
    path, size = write(tmp_path / f"a{suffix}", whole[:border])
    assert files.contents(path, size) == content[:100]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".gz", b"plain text\n"),
        (".zst", b"plain text\n"),
        (".gz", gzip_member(b"one\n") + b"garbage"),
        (".zst", zstd_frame(b"one\n") + b"garbage"),
        (".gz", gzip_member(b"one\n")[:-8] + bytes(8)),  # another checksum
        (".zst", zstd_frame(b"one\n")[:-4] + bytes(4)),
    ],
)
def test_damage_stops_the_reading(tmp_path: Path, suffix: str, content: bytes) -> None:
    path, size = write(tmp_path / f"a{suffix}", content)
    message = r"the file is damaged \(.*--on_bad_line=skip leaves out only single lines; download"
    with pytest.raises(BadLineError, match=message):
        list(files.lines(path, size, 0, size))
    with pytest.raises(BadLineError, match=message):
        files.contents(path, size)


def test_a_zstd_window_of_two_gigabytes_is_accepted(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path, size = write(tmp_path / "a.zst", compressor.compress(b"wide\n") + compressor.flush())
    assert files.contents(path, size) == b"wide\n"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    text = b"".join(rng.randbytes(500).hex().encode() + b"\n" for _ in range(16_000))
    compress = {"": bytes, ".gz": lambda c: gzip.compress(c, 1), ".zst": zstd_frame}[suffix]
    path, size = write(tmp_path / f"a{suffix}", compress(text))
    tracemalloc.start()
    count = sum(len(line) for _, line in files.lines(path, size, 0, size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(text) == 16_016_000
    assert peak < 4_000_000


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_document_has_an_end(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 10)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"file{ending}"
    path.write_bytes(pack(b"short\n0123456789\n"))
    size = path.stat().st_size
    with pytest.raises(BadLineError, match=r"line 2, byte 6: the document that begins here has"):
        list(files.lines(str(path), size, 0, size))
    with pytest.raises(BadLineError, match=r"line 1, byte 0: the document that begins here has"):
        files.contents(str(path), size)
