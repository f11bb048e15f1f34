"""Decompression yields chunks that fit in memory, and an error names the damaged place."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from mobilellm_jax.storage.decompression import ChunkedFile, DamageError, decompressed

TEXT = np.random.default_rng(0).integers(0, 4, 200_000, np.uint8).tobytes()
COMPRESS = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("format_", COMPRESS)
def test_members_follow_one_another(format_: str) -> None:
    stored = COMPRESS[format_](TEXT) + COMPRESS[format_](b"") + COMPRESS[format_](TEXT[:7])
    assert b"".join(decompressed(io.BytesIO(stored), format_, "a")) == TEXT + TEXT[:7]


@pytest.mark.parametrize("format_", COMPRESS)
def test_a_small_file_of_much_text_takes_little_memory(format_: str) -> None:
    zeros = bytes(1 << 27)
    stored = COMPRESS[format_](zeros)
    assert len(stored) < len(zeros) / 200
    lengths = [len(chunk) for chunk in decompressed(io.BytesIO(stored), format_, "a")]
    assert sum(lengths) == len(zeros)
    assert max(lengths) <= 1 << 26


@pytest.mark.parametrize("format_", COMPRESS)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda stored: stored[:-9], "cut off"),
        (lambda stored: stored + b"no such data", "damaged"),
        (lambda stored: b"", "cut off"),
    ],
)
def test_damage_comes_after_what_lies_before_it(
    format_: str, harm: Callable[[bytes], bytes], message: str
) -> None:
    found = b""
    with pytest.raises(DamageError, match=message):
        for chunk in decompressed(io.BytesIO(harm(COMPRESS[format_](TEXT))), format_, "a"):
            found += chunk
    assert TEXT.startswith(found)


def test_chunks_read_as_a_file() -> None:
    parts = [b"", b"one\ntw", b"", b"o\nthree", b""]
    with io.BufferedReader(ChunkedFile(iter(parts)), 4) as file:
        assert file.readlines() == [b"one\n", b"two\n", b"three"]
