"""Joins parts into shards: plans which documents each shard contains, and copies them.

The parts of a split in their order form a stream of documents. A shard ends with the document that
brings it to the requested number of tokens. The contents of the shards therefore depend only on the
documents, and not on how the documents are divided into parts. `Planner` needs the parts in order.
Any process can assemble a planned shard.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mobilellm_jax.data.preparation.parts import Job, Part, read_record
from mobilellm_jax.data.shards import ShardWriter, shard_name
from mobilellm_jax.data.token_stream import Shard, TokenStream
from mobilellm_jax.storage import rundir

_COPIED_AT_ONCE = 4_000_000  # Tokens that are copied in one step.


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The plan of the shard `name`: it contains tokens [start, stop) of the joined `parts`."""

    name: str
    parts: tuple[Shard, ...]
    start: int
    stop: int


class Planner:
    """Divides the documents of one split into shards of at least `job.shard_tokens` tokens.

    The first planned shard follows the shards that an earlier run of `prepare` completed. The final
    name of a shard contains the number of all shards, which is known only at the end. Until then,
    the name consists of the split and the index of the shard.
    """

    def __init__(self, job: Job, split: str) -> None:
        self.made: list[Shard] = []
        while (file := job.shards / f"{_provisional_name(split, len(self.made))}.json").is_file():
            self.made.append(read_record(file, Shard))
        self._job, self._split = job, split
        self._planned = len(self.made)
        self._waiting: list[Shard] = []  # Parts with documents that no plan contains yet.
        self._start = sum(shard.tokens for shard in self.made)  # Planned tokens in `_waiting`.
        self._used: list[Shard] = []

    def add(self, part: Part) -> Iterator[ShardPlan]:
        """Takes the next part; yields the plan of each shard that becomes full.

        Parts come in their order.
        """
        self._waiting += part.splits[self._split].shards
        while (goal := self._start + self._job.shard_tokens) <= self._end():
            # The shard ends with the first document that ends at `goal` or later.
            stream = TokenStream(self._job.parts, self._waiting, self._job.dtype)
            starts = stream.document_starts(goal, self._end())
            yield self._plan(int(starts[0]) if len(starts) else self._end())
        self._release()

    def end(self) -> Iterator[ShardPlan]:
        """If some documents are not in a shard yet, yields the plan of a last shard."""
        if self._waiting:
            yield self._plan(self._end())

    def delete_used_parts(self) -> None:
        """Deletes the arrays of parts whose shards are complete.

        The records of the parts stay, because they show the next run which pieces are encoded.
        """
        for part in self._used:
            for suffix in part.files:
                (self._job.parts / f"{part.name}.{suffix}").unlink(missing_ok=True)
        self._used.clear()

    def _end(self) -> int:
        return sum(part.tokens for part in self._waiting)

    def _plan(self, stop: int) -> ShardPlan:
        name = _provisional_name(self._split, self._planned)
        plan = ShardPlan(name, tuple(self._waiting), self._start, stop)
        self._planned += 1
        self._start = stop
        self._release()
        return plan

    def _release(self) -> None:
        while self._waiting and self._waiting[0].tokens <= self._start:
            self._used.append(self._waiting.pop(0))
            self._start -= self._used[-1].tokens


def assemble(job: Job, plan: ShardPlan) -> Shard:
    """Copies the documents of `plan` into a shard, then writes the record of the complete shard."""
    stream = TokenStream(job.parts, plan.parts, job.dtype)
    with ShardWriter(job.shards, plan.name, job.dtype) as writer:
        for start in range(plan.start, plan.stop, _COPIED_AT_ONCE):
            stop = min(start + _COPIED_AT_ONCE, plan.stop)
            starts = stream.document_starts(start, stop) - start
            writer.add(stream.read(start, stop), starts, stream.loss_mask(start, stop))
        shard = writer.complete()
    assert shard.tokens == plan.stop - plan.start, f"{plan.name}: parts do not fit their records"
    rundir.write_whole(job.shards / f"{plan.name}.json", json.dumps(dataclasses.asdict(shard)))
    return shard


def give_final_names(job: Job, output: Path, split: str, found: list[Shard]) -> list[Shard]:
    """Moves the shards of a split to `output`, under names that contain the number of shards.

    If an interruption stops the function, a second call moves the remaining files.
    """
    named = []
    for index, shard in enumerate(found):
        name = shard_name(split, index, len(found))
        for suffix in shard.files:
            source, target = job.shards / f"{shard.name}.{suffix}", output / f"{name}.{suffix}"
            if source.is_file() or not target.is_file():
                os.replace(source, target)
        named.append(dataclasses.replace(shard, name=name))
    return named


def _provisional_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"
