"""All files of a token folder, read once: their checksums, and whether what they say can be so.

A checksum finds damage. It does not find a folder that was made to mislead, in which ids lie beyond
the vocabulary or documents overlap, and from which training would learn nonsense without a word.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mobilellm_jax.data.preparation.workers import available_cores
from mobilellm_jax.data.shards import (
    LOSS_MASK,
    OFFSETS,
    REMEDY,
    TOKENS,
    Dataset,
    FileRecord,
    Manifest,
    Shard,
)
from mobilellm_jax.data.token_stream import LOSS_MASK_DTYPE, OFFSET_DTYPE
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.sealing import sha256_of

_Check = Callable[[NDArray[Any]], str]
"""Says what is wrong with the next chunk of an array, "" if nothing is."""


def verify_files(dataset: Dataset) -> None:
    """Reads every shard on all cores, with a progress bar on a terminal.

    Raises:
      UserError: naming the first file that has another checksum, or that makes no sense.
    """
    jobs = [
        (dataset.path / f"{shard.name}.{suffix}", record, *_rule(suffix, shard, dataset.manifest))
        for split in dataset.manifest.splits.values()
        for shard in split.shards
        for suffix, record in shard.files.items()
    ]
    total = sum(record.bytes for _, record, _, _ in jobs)
    bar = tqdm(total=total, desc="checking data", unit="B", unit_scale=True, disable=None)
    # hashlib and NumPy let other threads run while they compute.
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        problems = pool.map(lambda job: _problem(*job), jobs)
        for (file, record, _, _), problem in zip(jobs, problems, strict=True):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{file} {problem}; {REMEDY}")
            bar.update(record.bytes)


def _rule(suffix: str, shard: Shard, manifest: Manifest) -> tuple[np.dtype[Any], _Check]:
    """Returns the type of an array of a shard, and what must hold for it."""
    if suffix == TOKENS:
        beyond = functools.partial(_beyond, "token id", manifest.vocab_size)
        return np.dtype(manifest.dtype).newbyteorder("<"), beyond
    if suffix == LOSS_MASK:
        return LOSS_MASK_DTYPE, functools.partial(_beyond, "loss mask", 2)
    assert suffix == OFFSETS, f"{suffix} is no array of a shard"
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
    """Where documents start: at 0 first, then further and further on, all within the shard."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._last = -1

    def __call__(self, starts: NDArray[Any]) -> str:
        first, last = int(starts[0]), int(starts[-1])
        begins = first == 0 if self._last < 0 else first > self._last
        # Not by differences, which wrap around.
        if not begins or last >= self._tokens or not bool((starts[1:] > starts[:-1]).all()):
            return "does not ascend from 0 to less than the number of tokens"
        self._last = last
        return ""
