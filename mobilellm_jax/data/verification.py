"""Reads all files of a token folder once, and checks their checksums and their contents.

A checksum finds a damaged file. It does not find a file that was written with wrong contents: ids
that exceed the vocabulary, or documents that overlap. Without the check of contents, training on
such a file would learn nonsense and report no error.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mobilellm_jax.data.shards import REMEDY, Dataset, Manifest
from mobilellm_jax.data.token_stream import (
    LOSS_MASK,
    LOSS_MASK_DTYPE,
    OFFSET_DTYPE,
    OFFSETS,
    TOKENS,
    FileRecord,
    Shard,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.startup.cpu import available_cores
from mobilellm_jax.storage.sealing import sha256_of

_Check = Callable[[NDArray[Any]], str]
"""Checks the next chunk of an array, and returns a description of the fault or ""."""


def verify_files(dataset: Dataset) -> None:
    """Reads every shard on all cores, with a progress bar on a terminal.

    Raises:
      UserError: if a file has the wrong checksum or impossible contents; the message names the
        first such file.
    """
    jobs = [
        (dataset.path / f"{shard.name}.{suffix}", record, *_rule(suffix, shard, dataset.manifest))
        for split in dataset.manifest.splits.values()
        for shard in split.shards
        for suffix, record in shard.files.items()
    ]
    total = sum(record.bytes for _, record, _, _ in jobs)
    bar = tqdm(total=total, desc="checking data", unit="B", unit_scale=True, disable=None)
    # hashlib and NumPy release the GIL while they compute.
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        problems = pool.map(lambda job: _problem(*job), jobs)
        for (file, record, _, _), problem in zip(jobs, problems, strict=True):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{file} {problem}; {REMEDY}")
            bar.update(record.bytes)


def _rule(suffix: str, shard: Shard, manifest: Manifest) -> tuple[np.dtype[Any], _Check]:
    """Returns the dtype of the shard's array `suffix`, and the function that checks its chunks."""
    if suffix == TOKENS:
        beyond = functools.partial(_beyond, "token id", manifest.vocab_size)
        return np.dtype(manifest.dtype).newbyteorder("<"), beyond
    if suffix == LOSS_MASK:
        return LOSS_MASK_DTYPE, functools.partial(_beyond, "loss mask", 2)
    assert suffix == OFFSETS, f"{suffix} is not an array of a shard"
    return OFFSET_DTYPE, _Ascending(shard.tokens)


def _problem(file: Path, record: FileRecord, dtype: np.dtype[Any], check: _Check) -> str:
    problems: list[str] = []

    def look(block: bytes) -> None:
        if not problems and (problem := check(np.frombuffer(block, dtype))):
            problems.append(problem)

    digest = sha256_of(file, look=look)
    if digest != record.sha256:
        return f"has SHA-256 {digest}, but the manifest says {record.sha256}"
    return "".join(problems)


def _beyond(what: str, limit: int, values: NDArray[Any]) -> str:
    largest = int(values.max())
    return f"holds the {what} {largest}, which must be below {limit}" if largest >= limit else ""


class _Ascending:
    """Checks that offsets start at 0, increase, and stay within the shard."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._last = -1

    def __call__(self, starts: NDArray[Any]) -> str:
        first, last = int(starts[0]), int(starts[-1])
        begins = first == 0 if self._last < 0 else first > self._last
        # A comparison replaces np.diff, because differences of unsigned integers wrap around.
        if not begins or last >= self._tokens or not bool((starts[1:] > starts[:-1]).all()):
            return "does not ascend from 0 to less than the number of tokens"
        self._last = last
        return ""
