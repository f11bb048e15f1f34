"""Joins parts into shards: chooses the documents of each shard, and copies them.

A shard ends with the document that fills it. The shards depend on the documents alone, and not on
the division of documents into parts. Planning needs the parts in order. Any process can then
assemble a planned shard.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.preparation.parts import Part, part_file, read_record
from mobilellm_jax.data.shards import LOSS_MASK, OFFSETS, TOKENS, FileRecord, Shard, shard_name
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.data.token_stream import LOSS_MASK_DTYPE, OFFSET_DTYPE
from mobilellm_jax.storage import rundir

_COPIED_AT_ONCE = 8_000_000  # bytes per read; reading instead of mapping bounds the memory


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Documents [first, stop) of a part, which are its tokens [first_token, stop_token)."""

    part: int
    first: int
    stop: int
    first_token: int
    stop_token: int


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The plan of shard number `index` of a split."""

    split: str
    index: int
    stretches: tuple[Stretch, ...]
    masked: bool

    @property
    def end(self) -> tuple[int, int]:
        """Part and document after the last document of this shard."""
        return self.stretches[-1].part, self.stretches[-1].stop


@dataclasses.dataclass(frozen=True)
class _Assembled:
    """The record of a complete shard; the documents after it start at `end`."""

    shard: Shard
    end: tuple[int, int]


class Planner:
    """Divides the documents of one split into shards of at least `shard_tokens` tokens.

    It starts with shard `index` at document `start` = (part, document of the part), so an
    interrupted preparation continues after its last complete shard.
    """

    def __init__(
        self, parts: Path, split: str, shard_tokens: int, index: int, start: tuple[int, int]
    ) -> None:
        self._parts = parts
        self._split = split
        self._shard_tokens = shard_tokens
        self._index = index
        self._start = start
        self._stretches: list[Stretch] = []
        self._tokens = 0
        self._masked = False

    @property
    def first_part(self) -> int:
        """The earliest part that a shard without a plan needs."""
        return self._stretches[0].part if self._stretches else self._start[0]

    def add(self, part: Part) -> Iterator[ShardPlan]:
        """Takes the next part in order; yields the shards that this part fills."""
        if part.number < self._start[0]:
            return
        counts = part.splits[self._split]
        first = self._start[1] if part.number == self._start[0] else 0
        self._start = (part.number + 1, 0)
        if first >= counts.documents:
            return
        starts = self._read_starts(part)
        while first < counts.documents:
            # The first document whose end reaches the goal ends the shard.
            goal = int(starts[first]) + self._shard_tokens - self._tokens
            stop = min(int(np.searchsorted(starts[1:], goal)) + 1, counts.documents)
            stretch = Stretch(part.number, first, stop, int(starts[first]), int(starts[stop]))
            self._stretches.append(stretch)
            self._tokens += stretch.stop_token - stretch.first_token
            self._masked |= self._split in part.masked
            first = stop
            if self._tokens >= self._shard_tokens:
                yield self._cut()

    def end(self) -> Iterator[ShardPlan]:
        """Yields the last shard, if documents are left for it."""
        if self._stretches:
            yield self._cut()

    def _cut(self) -> ShardPlan:
        plan = ShardPlan(self._split, self._index, tuple(self._stretches), self._masked)
        self._index += 1
        self._stretches, self._tokens, self._masked = [], 0, False
        return plan

    def _read_starts(self, part: Part) -> NDArray[np.int64]:
        """Returns the starts of the documents, followed by the end of the last document."""
        file = part_file(self._parts, part.number, self._split, OFFSETS)
        starts = np.fromfile(file, OFFSET_DTYPE).astype(np.int64)
        counts = part.splits[self._split]
        assert len(starts) == counts.documents, f"{file} does not fit its record"
        return np.append(starts, counts.tokens)


def assemble(parts: Path, shards: Path, plan: ShardPlan, dtype: np.dtype[Any]) -> Shard:
    """Copies the documents of the plan into a shard and writes its record, which completes it.

    The shard is named by its place only, because the number of shards is not known yet.
    """
    name = _provisional_name(plan.split, plan.index)
    suffixes = [TOKENS, OFFSETS, *([LOSS_MASK] if plan.masked else [])]
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_HashedFile(shards / f"{name}.{s}")) for s in suffixes}
        base = 0
        for stretch in plan.stretches:
            tokens = range(stretch.first_token, stretch.stop_token)
            _copy(
                part_file(parts, stretch.part, plan.split, TOKENS), tokens, dtype, writers[TOKENS]
            )
            file = part_file(parts, stretch.part, plan.split, OFFSETS)
            starts = np.fromfile(
                file, OFFSET_DTYPE, stretch.stop - stretch.first, offset=8 * stretch.first
            )
            moved = starts.astype(np.int64) + (base - stretch.first_token)
            writers[OFFSETS].write(moved.astype(OFFSET_DTYPE).tobytes())
            if plan.masked:
                file = part_file(parts, stretch.part, plan.split, LOSS_MASK)
                if file.is_file():
                    _copy(file, tokens, LOSS_MASK_DTYPE, writers[LOSS_MASK])
                else:
                    writers[LOSS_MASK].write(np.ones(len(tokens), LOSS_MASK_DTYPE).tobytes())
            base += len(tokens)
        files = {suffix: writer.record() for suffix, writer in writers.items()}
    documents = sum(stretch.stop - stretch.first for stretch in plan.stretches)
    shard = Shard(name=name, documents=documents, tokens=base, files=files)
    record = dataclasses.asdict(_Assembled(shard, plan.end))
    rundir.write_whole(_record_file(shards, plan.split, plan.index), json.dumps(record))
    return shard


def read_assembled(shards: Path, split: str) -> tuple[list[Shard], tuple[int, int]]:
    """Returns the complete shards from the first on, and the start of the documents after them."""
    found: list[Shard] = []
    end = (0, 0)
    while (file := _record_file(shards, split, len(found))).is_file():
        record: _Assembled = read_record(file, _Assembled)
        found.append(record.shard)
        end = record.end
    return found, end


def give_final_names(shards: Path, output: Path, split: str, found: list[Shard]) -> list[Shard]:
    """Moves the shards of a split to `output`, under names that contain their number.

    The function can be called again after an interruption.
    """
    named = []
    for index, shard in enumerate(found):
        name = shard_name(split, index, len(found))
        for suffix in shard.files:
            source, target = shards / f"{shard.name}.{suffix}", output / f"{name}.{suffix}"
            if source.is_file() or not target.is_file():
                os.replace(source, target)
        named.append(dataclasses.replace(shard, name=name))
    return named


class Joiner:
    """Assembles shards as soon as their parts exist, and then deletes the arrays of these parts.

    The records of the parts stay, because they count the finished work.
    """

    def __init__(self, work: Path, dtype: Any, shard_tokens: int) -> None:
        self._parts, self._shards = work / "parts", work / "shards"
        self._dtype = dtype
        self._made: dict[str, list[Shard]] = {}
        self._planners: dict[str, Planner] = {}
        self._kept_from: dict[str, int] = {}
        for split in (TRAIN, VALIDATION):
            self._made[split], start = read_assembled(self._shards, split)
            self._kept_from[split] = 0
            self._planners[split] = Planner(
                self._parts, split, shard_tokens, len(self._made[split]), start
            )

    def add(self, part: Part) -> None:
        """Takes the next part in order."""
        for split, planner in self._planners.items():
            self._assemble(split, planner.add(part))
            for number in range(self._kept_from[split], planner.first_part):
                for suffix in (TOKENS, OFFSETS, LOSS_MASK):
                    part_file(self._parts, number, split, suffix).unlink(missing_ok=True)
            self._kept_from[split] = planner.first_part

    def end(self) -> dict[str, list[Shard]]:
        """Assembles the rest; returns the shards of every split in order."""
        for split, planner in self._planners.items():
            self._assemble(split, planner.end())
        return self._made

    def _assemble(self, split: str, plans: Iterator[ShardPlan]) -> None:
        for plan in plans:
            self._made[split].append(assemble(self._parts, self._shards, plan, self._dtype))


class _HashedFile(rundir.WholeFile):
    """A whole file that also counts and hashes its bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, content: bytes) -> None:
        super().write(content)
        self._hash.update(content)
        self._bytes += len(content)

    def record(self) -> FileRecord:
        """Completes the file and returns its size and checksum."""
        self.complete()
        return FileRecord(bytes=self._bytes, sha256=self._hash.hexdigest())


def _copy(file: Path, tokens: range, dtype: np.dtype[Any], target: _HashedFile) -> None:
    with file.open("rb") as opened:
        opened.seek(tokens.start * dtype.itemsize)
        left = len(tokens) * dtype.itemsize
        while left:
            content = opened.read(min(left, _COPIED_AT_ONCE))
            assert content, f"{file} is shorter than its record says"
            target.write(content)
            left -= len(content)


def _provisional_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def _record_file(shards: Path, split: str, index: int) -> Path:
    return shards / f"{_provisional_name(split, index)}.json"
