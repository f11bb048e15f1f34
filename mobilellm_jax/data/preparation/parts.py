"""Encodes pieces of sources into parts on disk, in any order and on any machine.

A part contains the encoded documents of one piece. It has one shard for each split, with the name
NUMBER.SPLIT, if the split has documents in the piece. `PieceEncoder` writes the record
`NUMBER.json` last, so a part that has a record is complete. `assembly.py` joins the parts into the
shards of the output.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.preparation.cutting import Cut, cut_documents, is_held_out
from mobilellm_jax.data.shards import Counts, ShardWriter, Split, token_dtype
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import (
    TRAIN,
    VALIDATION,
    BadLine,
    Document,
    Piece,
    Source,
    TokenDocument,
    stop,
)
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, document_start, join_documents
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir, strict_json

_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 10_000

Count = Callable[[Counts], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings that all workers of a `prepare` run share; `work` must be on a shared disk."""

    sources: tuple[str, ...]
    work: Path
    tokenizer: Path
    dtype: np.dtype[Any]  # Type of the token ids on disk.
    skip_bad_lines: bool
    shard_tokens: int
    cut: Cut | None = None  # The document of which only the end is held out.

    @property
    def parts(self) -> Path:
        return self.work / "parts"

    @property
    def shards(self) -> Path:
        """The folder for shards that have no final name yet."""
        return self.work / "shards"


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece to encode; its documents with a digest below `held_out` are for validation."""

    number: int
    source: int
    held_out: int
    piece: Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The record of a part; `number` is its position among all parts of the `prepare` run."""

    number: int
    source: int
    splits: Mapping[str, Split]  # Each split has at most one shard.
    empty_documents: int
    bad_lines: tuple[Mapping[str, Any], ...]
    # Number of documents of each split whose loss mask excludes every token.
    without_target: Mapping[str, int] = dataclasses.field(default_factory=dict)


class PieceEncoder:
    """Encodes the pieces of one job; opens the tokenizer and each source only once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = load_tokenizer(job.tokenizer)
        self._sources: dict[int, Source] = {}

    def encode(self, task: Task, count: Count) -> Part:
        """Writes the part of `task` and returns its record; calls `count` after every batch.

        Raises:
          UserError: if the tokenizer or the source refuses a document and the job does not skip bad
            lines.
        """
        job = self._job
        skipped: list[dict[str, Any]] = []
        empty = 0
        counts = {TRAIN: Counts(), VALIDATION: Counts()}
        without_target = dict.fromkeys(counts, 0)

        def on_bad(bad: BadLine) -> None:
            if not job.skip_bad_lines:
                stop(bad)
            skipped.append(dataclasses.asdict(bad))

        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    ShardWriter(job.parts, f"{task.number:08d}.{split}", job.dtype)
                )
                for split in counts
            }
            documents = self._source(task.source).documents(task.piece, on_bad)
            for batch in _batches(cut_documents(documents, job.cut if task.held_out else None)):
                present = [d for d in batch if isinstance(d, TokenDocument) or d.text]
                empty += len(batch) - len(present)
                bad_lines = skipped if job.skip_bad_lines else None
                encoded = _encode(self._tokenizer, present, bad_lines)
                for split, chosen in _divided(encoded, task):
                    starts = np.cumsum(chosen.lengths) - chosen.lengths
                    writers[split].add(chosen.ids, starts, chosen.loss_mask)
                    counts[split] += chosen.counts
                    without_target[split] += chosen.without_target(starts)
                count(encoded.counts)
            shards = {s: (w.complete(),) if w.documents else () for s, w in writers.items()}
        part = Part(
            number=task.number,
            source=task.source,
            splits={
                split: Split(**dataclasses.asdict(counts[split]), shards=shards[split])
                for split in counts
            },
            empty_documents=empty,
            bad_lines=tuple(skipped),
            without_target=without_target,
        )
        rundir.write_whole(
            record_file(job.parts, task.number), json.dumps(dataclasses.asdict(part))
        )
        return part

    def _source(self, index: int) -> Source:
        if index not in self._sources:
            spec = self._job.sources[index]
            self._sources[index] = open_source(spec, self._job.work / "sources" / str(index))
        return self._sources[index]


def read_part(parts: Path, number: int) -> Part | None:
    """Returns the record of a part, or None if the part is not complete."""
    file = record_file(parts, number)
    if not file.is_file():
        return None
    part: Part = read_record(file, Part)
    return part


def read_record(file: Path, kind: Any) -> Any:
    """Returns the record in `file` as a `kind`, or raises a UserError if the record is damaged."""
    try:
        return strict_json.as_type(strict_json.read(file), kind)
    except strict_json.JsonError as error:
        raise UserError(
            f"{error} An interrupted preparation is damaged; delete {file.parent.parent} to begin "
            "anew."
        ) from error


def record_file(parts: Path, number: int) -> Path:
    """Returns the path of a part's record, which exists only if the part is complete."""
    return parts / f"{number:08d}.json"


class _Encoded(NamedTuple):
    """An encoded batch: the ids of all documents in one array, with BOS and EOS, and the sizes."""

    documents: Sequence[Document | TokenDocument]
    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    loss_mask: NDArray[np.uint8] | None

    @property
    def counts(self) -> Counts:
        return Counts(
            documents=len(self.documents),
            tokens=len(self.ids),
            text_bytes=int(self.text_bytes.sum()),
        )

    def without_target(self, starts: NDArray[np.int64]) -> int:
        """Returns how many documents have no target; `starts` holds the documents' positions."""
        if self.loss_mask is None:
            return 0
        return int(np.count_nonzero(np.maximum.reduceat(self.loss_mask, starts) == 0))


def _encode(
    tokenizer: Tokenizer,
    documents: Sequence[Document | TokenDocument],
    bad_lines: list[dict[str, Any]] | None,
) -> _Encoded:
    """Encodes documents; reports a refused document in `bad_lines`, or raises if it is None."""
    try:
        return _encode_all(tokenizer, documents)
    except ValueError:
        # The error does not tell which document failed, so each document is encoded alone.
        kept = []
        for document in documents:
            try:
                _encode_all(tokenizer, [document])
                kept.append(document)
            except ValueError as error:
                if bad_lines is None:
                    raise UserError(f"{document.name}: {error}") from error
                bad_lines.append({"document": document.name, "reason": str(error)})
        return _encode_all(tokenizer, kept)


def _encode_all(tokenizer: Tokenizer, documents: Sequence[Document | TokenDocument]) -> _Encoded:
    texts = [document.text for document in documents if isinstance(document, Document)]
    given = [document for document in documents if isinstance(document, TokenDocument)]
    dtype = token_dtype(tokenizer.vocab_size)
    loss_mask = None
    if given:
        assert not texts, "a source gives documents of one kind"
        rows, masks = zip(*(_with_bos_and_eos(tokenizer, each) for each in given), strict=True)
        ids, starts = join_documents(rows, dtype, tokenizer.vocab_size)
        if any(each.loss_mask is not None for each in given):
            loss_mask = np.concatenate(masks, dtype=np.uint8)
        texts = [tokenizer.decode(each.ids) for each in given]
    else:
        ids, starts = tokenizer.encode_documents(texts, dtype)
    text_bytes = np.array([len(text.encode()) for text in texts], np.int64)
    return _Encoded(documents, ids, np.diff(starts, append=len(ids)), text_bytes, loss_mask)


def _with_bos_and_eos(
    tokenizer: Tokenizer, document: TokenDocument
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Returns the ids with BOS and EOS, and their mask; checks that the vocabulary has the ids."""
    ids = np.asarray(document.ids, np.int64)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        raise UserError(
            f"token id {ids.max()} must be less than the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}; give the --tokenizer that made these ids."
        )
    given = document.loss_mask
    mask = np.ones(len(ids), np.uint8) if given is None else np.asarray(given, np.uint8)
    start = document_start(tokenizer)
    given_bos = len(ids) > 0 and ids[0] == tokenizer.bos_id
    if given_bos and tokenizer.bos_id == tokenizer.eos_id and len(ids) > 1:
        ids, mask = ids[1:], mask[1:]  # The EOS of the document before is the separator.
    begun = not start or (len(ids) >= len(start) and tuple(ids[: len(start)]) == start)
    if not (len(ids) > len(start) * begun and ids[-1] == tokenizer.eos_id):
        # An added EOS is a target if the token before it is a target.
        ids = np.append(ids, tokenizer.eos_id)
        mask = np.append(mask, mask[-1:] if len(mask) else np.uint8(1))
    if not begun:
        # An added BOS is a target if the document has no loss mask.
        ids = np.insert(ids, 0, start)
        mask = np.insert(mask, 0, [given is None] * len(start))
    return ids, mask


def _divided(encoded: _Encoded, task: Task) -> Iterator[tuple[str, _Encoded]]:
    """Yields each split that has documents in the batch, with these documents."""
    if task.held_out:
        held_D = np.array([is_held_out(d, task.held_out) for d in encoded.documents], np.bool_)
    else:
        held_D = np.full(len(encoded.documents), task.piece.split == VALIDATION)
    for split, chosen_D in ((TRAIN, ~held_D), (VALIDATION, held_D)):
        if chosen_D.any():
            of_chosen = np.repeat(chosen_D, encoded.lengths)
            mask = encoded.loss_mask
            yield (
                split,
                _Encoded(
                    list(itertools.compress(encoded.documents, chosen_D)),
                    encoded.ids[of_chosen],
                    encoded.lengths[chosen_D],
                    encoded.text_bytes[chosen_D],
                    None if mask is None else mask[of_chosen],
                ),
            )


def _batches(
    documents: Iterator[Document | TokenDocument],
) -> Iterator[list[Document | TokenDocument]]:
    batch: list[Document | TokenDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.ids if isinstance(document, TokenDocument) else document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
