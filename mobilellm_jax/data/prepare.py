"""Sources to token shards: two passes over the documents, in memory that does not grow with them.

The first pass decides which documents are held out for validation, of sources that have no such
split, and gathers the text that a tokenizer is trained on; the second encodes and writes. Equal
sources and settings give equal files, byte for byte.
"""

import contextlib
import hashlib
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_jax import rundir
from mobilellm_jax.data import shards
from mobilellm_jax.data.shards import Manifest, SplitWriter
from mobilellm_jax.data.sources import TRAIN, VALIDATION, Document, Source, open_source
from mobilellm_jax.data.tokenizer import (
    Tokenizer,
    changes_text,
    copy_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SHARD_TOKENS = 64_000_000

# Enough for the merges of any vocabulary; SentencePiece trains on it for minutes, not hours.
_TOKENIZER_TRAINING_CHARACTERS = 50_000_000
_BATCH_CHARACTERS = 1_000_000
_DIGESTS = 1 << 64
_LOGGER = logging.getLogger(__name__)


def prepare(
    sources: Sequence[str],
    output: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    validation_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[str], None] = _LOGGER.info,
) -> Manifest:
    """Writes the documents of `sources`, one source after the other, as token shards to `output`.

    Give `tokenizer`, a file to use, or `vocab_size`, to train one on the training documents. Of
    sources without a validation split of their own, about `validation_fraction` of the documents is
    held out, chosen by a hash of their text; at least one, unless the fraction is 0. `output`
    appears when it is complete. If it is complete already and was made with the same settings from
    the same documents, it stays as it is. `report` gets lines for the user.

    Raises:
      ValueError: for a bad setting, sources without text, or an `output` that holds something else.
      FileNotFoundError: for a missing tokenizer file, or a pattern that matches nothing.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError(
            f"tokenizer={str(tokenizer) if tokenizer else None!r} and vocab_size={vocab_size}: "
            "give exactly one, a tokenizer file to use or the size of one to train."
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must be at least 0 and less than 1."
        )
    if not sources:
        raise ValueError("source is empty; give at least one, for example --source=python_docs.")
    with tempfile.TemporaryDirectory() as scratch:
        opened = [
            open_source(spec, Path(scratch) / str(index)) for index, spec in enumerate(sources)
        ]
        given = load_tokenizer(tokenizer) if tokenizer else None
        settings = {
            "sources": [source.identity() for source in opened],
            "tokenizer": f"SHA-256 {given.sha256}" if given else f"trained, {vocab_size} tokens",
            "validation_fraction": validation_fraction,
            "shard_tokens": shard_tokens,
        }
        if made := _complete_output(output, settings):
            report(f"{output} is complete already, made with the same settings; nothing to do.")
            return made
        with rundir.whole_directory(output) as folder:
            held_out, sample = _first_pass(opened, validation_fraction, trains=given is None)
            if given is None:
                assert vocab_size is not None, "checked above"
                report(f"Training a tokenizer of {vocab_size:,} tokens.")
                used = train_tokenizer(sample, vocab_size, folder / rundir.SENTENCEPIECE_MODEL)
            else:
                used = given
                copy_tokenizer(given, folder)
                if changes_text(given):
                    report(
                        f"{given.file} normalises text, so decoding will not restore it exactly."
                    )
            del sample
            manifest = _write(opened, used, folder, held_out, shard_tokens, settings)
    for name, split in manifest.splits.items():
        report(
            f"{name}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} "
            f"tokens ({split.text_bytes / split.tokens:.2f} bytes per token)."
        )
    return manifest


def _complete_output(output: Path, settings: dict[str, Any]) -> Manifest | None:
    """Returns the manifest of an `output` to be kept, or None if there is nothing in the way."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / shards.MANIFEST).is_file():
        raise ValueError(
            f"output={str(output)!r} exists, but is no folder of token shards (it has no "
            f"{shards.MANIFEST}); name another folder or delete it."
        )
    manifest = shards.open_tokens(output).manifest
    differing = [
        f"{key}: there {manifest.settings.get(key)!r}, asked for {value!r}"
        for key, value in settings.items()
        if manifest.settings.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"output={str(output)!r} holds data made with other settings ({'; '.join(differing)}); "
            "name another folder or delete it."
        )
    return manifest


def _first_pass(
    sources: Sequence[Source], validation_fraction: float, *, trains: bool
) -> tuple[int, list[str]]:
    """Returns the digest below which documents are held out, and text to train a tokenizer on."""
    held_out = int(validation_fraction * _DIGESTS)
    sample = _Sample(_TOKENIZER_TRAINING_CHARACTERS)
    smallest, largest, has_validation = _DIGESTS, -1, held_out == 0
    for source in sources:
        divided = VALIDATION not in source.splits()
        has_validation |= not divided
        if not trains and not (divided and held_out):
            continue
        for document in _progress(source.documents(TRAIN), f"reading {source.spec}"):
            digest = _digest(document.text) if divided else _DIGESTS
            if divided:
                smallest, largest = min(smallest, digest), max(largest, digest)
            if trains and digest >= held_out:
                sample.add(document.text)
    if smallest < largest:
        # A few documents may all fall on one side; then one goes to the other.
        return (min(max(held_out, smallest + 1), largest) if held_out else 0), sample.lines()
    if not has_validation and largest >= 0:
        raise ValueError(
            f"validation_fraction={validation_fraction} cannot be held out of a single document "
            f"({sources[0].spec}); divide the text into several files, add a source, or set "
            "--validation_fraction=0 to go without validation."
        )
    return 0, sample.lines()


class _Sample:
    """Lines of all texts added, thinned out evenly (and always alike) to a number of characters."""

    def __init__(self, most_characters: int) -> None:
        self._most = most_characters
        self._random = random.Random(0)
        self._kept: list[tuple[float, str]] = []
        self._characters = 0
        self._share = 1.0

    def add(self, text: str) -> None:
        for line in text.split("\n"):
            rank = self._random.random()
            if line and rank < self._share:
                self._kept.append((rank, line))
                self._characters += len(line)
        while self._characters > self._most and len(self._kept) > 1:
            self._share /= 2
            self._kept = [(rank, line) for rank, line in self._kept if rank < self._share]
            self._characters = sum(len(line) for _, line in self._kept)

    def lines(self) -> list[str]:
        return [line for _, line in self._kept]


def _write(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    folder: Path,
    held_out: int,
    shard_tokens: int,
    settings: dict[str, Any],
) -> Manifest:
    dtype = shards.token_dtype(tokenizer.vocab_size)
    written: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        writers = {
            split: SplitWriter(folder, split, dtype, shard_tokens) for split in (TRAIN, VALIDATION)
        }
        for writer in writers.values():
            stack.callback(writer.abandon)
        for source in sources:
            documents = {TRAIN: 0, VALIDATION: 0}
            bar = _progress(_assigned(source, held_out), f"encoding {source.spec}")
            tokens = 0
            for batch in _batches(bar):
                texts = [document.text for _, document in batch]
                for (split, document), ids in zip(
                    batch, _encode(tokenizer, batch, texts), strict=True
                ):
                    row = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)
                    writers[split].add(row, len(document.text.encode()))
                    documents[split] += 1
                    tokens += len(row)
                rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s")
            written.append({"spec": source.spec, "documents": documents})
        splits = {name: writer.close() for name, writer in writers.items()}
    if not splits[TRAIN].documents:
        raise ValueError(
            f"source={', '.join(source.spec for source in sources)}: no document with text for "
            "training; check the pattern and --validation_fraction."
        )
    manifest = Manifest(
        format_version=shards.FORMAT_VERSION,
        tokenizer=_name_in_output(tokenizer),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=dtype.name,
        splits={name: split for name, split in splits.items() if split.documents},
        sources=tuple(written),
        settings=settings,
    )
    shards.write_manifest(folder, manifest)
    return manifest


def _name_in_output(tokenizer: Tokenizer) -> str:
    model = tokenizer.file.suffix == ".model"
    return rundir.SENTENCEPIECE_MODEL if model else rundir.TOKENIZER_JSON


def _assigned(source: Source, held_out: int) -> Iterator[tuple[str, Document]]:
    """Yields (split, document) for all documents of a source."""
    own = source.splits()
    for split in own:
        for document in source.documents(split):
            held = VALIDATION not in own and _digest(document.text) < held_out
            yield (VALIDATION if held else split), document


def _batches(
    documents: "tqdm[tuple[str, Document]]",
) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    characters = 0
    for assigned in documents:
        batch.append(assigned)
        characters += len(assigned[1].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Tokenizer, batch: Sequence[tuple[str, Document]], texts: Sequence[str]
) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except ValueError:
        # One of many: find out which, for the message.
        for _, document in batch:
            try:
                tokenizer.encode(document.text)
            except ValueError as error:
                raise ValueError(f"{document.name}: {error}") from error
        raise


def _digest(text: str) -> int:
    """Returns 64 bits that decide whether a document is held out; equal texts stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _progress(documents: Any, description: str) -> Any:
    """Counts documents on a terminal, silent elsewhere."""
    return tqdm(documents, desc=description, unit=" documents", disable=None)
