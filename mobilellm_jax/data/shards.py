"""Token shards: the folder that `prepare` writes and training reads.

    manifest.json                   Description; written last, so it completes the folder.
    tokenizer.model | tokenizer.json
    SPLIT-00000-of-000NN.tokens     Token ids, little-endian uint16 (uint32 from 65,536 ids).
    SPLIT-00000-of-000NN.offsets    Start of each document in the shard, little-endian uint64.
    SPLIT-00000-of-000NN.loss_mask  uint8 per token, 0 if it is not a target; may be absent.

A document is stored in one shard, as BOS, its tokens and EOS. The shards of a split, in order, are
the token stream of the split (`token_stream.py`). Within a split, the documents of the sources
follow each other in the order of the manifest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.data.token_stream import (
    LOSS_MASK,
    LOSS_MASK_DTYPE,
    OFFSET_DTYPE,
    OFFSETS,
    TOKENS,
    FileRecord,
    Shard,
    TokenStream,
)
from mobilellm_jax.data.tokenizers.tokenizer import MAX_VOCABULARY
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind, rundir, strict_json
from mobilellm_jax.storage.strict_json import shown

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
UINT32_VOCABULARY = 65_536

REMEDY = "the folder is damaged: delete it and prepare it again."

_SPLIT_NAME = re.compile("[a-z_]{1,40}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of documents, tokens (BOS and EOS included) and UTF-8 bytes of the documents."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Counts):
    """The counts of a split, and the shards of the split in the order of its stream."""

    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """A source in the manifest; `weight` is None if the user gave no weights.

    `bad_lines` lists the lines that `--on_bad_line=skip` left out, with file, line, byte_offset and
    reason.
    """

    spec: str
    weight: float | None
    splits: Mapping[str, Counts]
    empty_documents: int
    bad_lines: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a folder of token shards; `settings` are the settings of `prepare`."""

    format_version: int
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str
    splits: Mapping[str, Split]
    sources: tuple[SourceRecord, ...]
    settings: Mapping[str, Any]
    # The tokens before every document. Older versions did not write this field, and stored BOS.
    document_start: tuple[int, ...] | None = None

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The facts that decide the tokens of a document. Mixed data must have equal facts."""
        return self.tokenizer_sha256, self.vocab_size, self.eos_id, self.start

    @property
    def start(self) -> tuple[int, ...]:
        """The tokens before every document."""
        return (self.bos_id,) if self.document_start is None else self.document_start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """An opened folder of token shards."""

    path: Path
    manifest: Manifest
    tokenizer: Path
    splits: Mapping[str, TokenStream]

    def source_stream(self, split: str, source: int) -> TokenStream:
        """Returns the part of a split's stream that contains the documents of source `source`."""
        counts = [record.splits.get(split, Counts()) for record in self.manifest.sources]
        start = sum(each.tokens for each in counts[:source])
        stop = start + counts[source].tokens
        return self.splits[split].view(start, stop, counts[source].documents)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the data that training reads; independent of the folder's path and date."""
        manifest = self.manifest
        content = {
            "tokenizer": manifest.tokenizer_sha256,
            "dtype": manifest.dtype,
            "splits": {
                name: [{k: f.sha256 for k, f in shard.files.items()} for shard in split.shards]
                for name, split in manifest.splits.items()
            },
            "sources": [
                [source.weight, {name: counts.tokens for name, counts in source.splits.items()}]
                for source in manifest.sources
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the dtype of token ids on disk."""
    return np.dtype("<u2" if vocab_size < UINT32_VOCABULARY else "<u4")


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the common name of a shard's files, without a suffix."""
    return f"{split}-{index:05d}-of-{count:05d}"


def open_tokens(path: Path) -> Dataset:
    """Opens a complete folder; checks the sizes of its files and the checksum of the tokenizer.

    Raises:
      MissingFileError: if the folder, its manifest or a listed file is missing.
      UserError: if the size or the checksum of a file differs from the manifest.
    """
    manifest = read_manifest(path)
    itemsize = np.dtype(manifest.dtype).itemsize
    for split in manifest.splits.values():
        for shard in split.shards:
            implied = {
                TOKENS: shard.tokens * itemsize,
                OFFSETS: shard.documents * 8,
                LOSS_MASK: shard.tokens,
            }
            for suffix, record in shard.files.items():
                _check_size(path / f"{shard.name}.{suffix}", record.bytes, implied[suffix])
    tokenizer = path / manifest.tokenizer
    if not file_kind.is_there(tokenizer):
        raise MissingFileError(f"{tokenizer} is missing; {REMEDY}")
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    if found != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer} has SHA-256 {found}, but the tokens were made with "
            f"{manifest.tokenizer_sha256}; {REMEDY}"
        )
    splits = {
        name: TokenStream(path, split.shards, np.dtype(manifest.dtype))
        for name, split in manifest.splits.items()
    }
    return Dataset(path=path, manifest=manifest, tokenizer=tokenizer, splits=splits)


def read_manifest(path: Path) -> Manifest:
    """Checks and returns the manifest of a folder; does not check the files that it lists.

    Raises:
      MissingFileError: if the manifest is missing.
      UserError: if the manifest is damaged or has another format version.
    """
    file = path / MANIFEST
    if not file_kind.is_there(file):
        state = "is incomplete: it has no" if path.is_dir() else "does not exist, so there is no"
        raise MissingFileError(
            f"Token folder {path} {state} {MANIFEST}. Make it with "
            f"`mobilellm prepare --source=... --output={path}`."
        )
    try:
        values = strict_json.parse(strict_json.content_of(file))
        version = values.get("format_version") if isinstance(values, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise UserError(
                f"{file}: format_version={version} must be {FORMAT_VERSION}; "
                "prepare the data again with this version of mobilellm."
            )
        manifest: Manifest = strict_json.as_type(values, Manifest)
    except strict_json.JsonError as error:
        raise UserError(f"{file}: {str(error).removesuffix('.')}; {REMEDY}") from error
    for problem in _contradictions(manifest):
        raise UserError(f"{file}: {problem}; {REMEDY}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which completes `folder`."""
    rundir.write_whole(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


class ShardWriter(contextlib.ExitStack):
    """Writes documents to the files of a shard; `complete` gives these files their final names.

    If the `with` block ends without a call of `complete`, the files are deleted. If any call of
    `add` gets a mask, the shard has a loss mask. In calls without a mask, every token is a target.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self.documents = self.tokens = 0
        self._folder, self._name, self._dtype = folder, name, dtype
        self._files: dict[str, _HashedFile] = {}

    def add(
        self, ids_N: NDArray[Any], start_D: NDArray[np.int64], mask_N: NDArray[np.uint8] | None
    ) -> None:
        """Appends the documents in `ids_N`, which start at the indices `start_D`."""
        if mask_N is not None and LOSS_MASK not in self._files:
            self._write(LOSS_MASK, np.ones(self.tokens, LOSS_MASK_DTYPE))
        self._write(TOKENS, ids_N.astype(self._dtype, copy=False))
        self._write(OFFSETS, (start_D + self.tokens).astype(OFFSET_DTYPE))
        if LOSS_MASK in self._files:
            all_targets = np.ones(len(ids_N), LOSS_MASK_DTYPE)
            self._write(LOSS_MASK, all_targets if mask_N is None else mask_N)
        self.documents += len(start_D)
        self.tokens += len(ids_N)

    def complete(self) -> Shard:
        """Completes the files of the shard on disk, and returns the shard's description."""
        suffixes = [s for s in (TOKENS, OFFSETS, LOSS_MASK) if s in self._files]
        files = {suffix: self._files[suffix].record() for suffix in suffixes}
        return Shard(name=self._name, documents=self.documents, tokens=self.tokens, files=files)

    def _write(self, suffix: str, array: NDArray[Any]) -> None:
        if suffix not in self._files:
            file = _HashedFile(self._folder / f"{self._name}.{suffix}")
            self._files[suffix] = self.enter_context(file)
        self._files[suffix].write(array.tobytes())


class _HashedFile(rundir.WholeFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, content: bytes) -> None:
        super().write(content)
        self._hash.update(content)
        self._bytes += len(content)

    def record(self) -> FileRecord:
        self.complete()
        return FileRecord(bytes=self._bytes, sha256=self._hash.hexdigest())


def _contradictions(manifest: Manifest) -> Iterator[str]:
    if manifest.tokenizer not in rundir.TOKENIZER_FILES:
        files = ", ".join(rundir.TOKENIZER_FILES)
        yield f"tokenizer={shown(manifest.tokenizer)} is not one of {files}"
    if manifest.vocab_size < 1 or manifest.vocab_size > MAX_VOCABULARY:
        yield f"vocab_size={manifest.vocab_size} is not between 1 and {MAX_VOCABULARY}"
    elif manifest.dtype != token_dtype(manifest.vocab_size).name:
        wanted = token_dtype(manifest.vocab_size).name
        yield f"dtype={shown(manifest.dtype)} is not {wanted}, as vocab_size demands"
    if any(not 0 <= token < manifest.vocab_size for token in manifest.document_start or ()):
        yield f"document_start={shown(manifest.document_start)} has an id beyond vocab_size"
    for name in ("bos_id", "eos_id"):
        if not 0 <= getattr(manifest, name) < manifest.vocab_size:
            yield f"{name}={getattr(manifest, name)} is not an id below vocab_size"
    for name, split in manifest.splits.items():
        # A name that contains a slash could refer to a file outside the folder.
        if not _SPLIT_NAME.fullmatch(name):
            yield f"{shown(name)} is not the name of a split"
        yield from _impossible(f"split {name}", split)
        for index, shard in enumerate(split.shards):
            if shard.name != shard_name(name, index, len(split.shards)):
                yield f"{shown(shard.name)} is not the name of shard {index} of split {name}"
            if not {TOKENS, OFFSETS} <= shard.files.keys() <= {TOKENS, OFFSETS, LOSS_MASK}:
                yield f"shard {shard.name} has files {', '.join(map(shown, shard.files))}"
            yield from _impossible(f"shard {shard.name}", shard)
            if not shard.documents:
                yield f"shard {shard.name} has no documents"
        yield from _unequal(f"{name} shards", split, split.shards)
        of_sources = [source.splits.get(name, Counts()) for source in manifest.sources]
        yield from _unequal(f"{name} of the sources", split, of_sources)
    for number, source in enumerate(manifest.sources, start=1):
        for name, counts in source.splits.items():
            yield from _impossible(f"{shown(name)} of source {number}", counts)
        if source.weight is not None and not source.weight > 0:
            yield f"weight={source.weight} of source {number} is not above 0"
    if len({source.weight is None for source in manifest.sources}) > 1:
        yield "some sources have a weight, and others none"


def _impossible(what: str, counts: Counts | Shard) -> Iterator[str]:
    if not 0 <= counts.documents <= counts.tokens:
        yield f"{what} has {counts.documents} documents in {counts.tokens} tokens"
    elif counts.tokens and not counts.documents:
        yield f"{what} has {counts.tokens} tokens without a document"


def _unequal(what: str, whole: Counts, parts: Sequence[Counts | Shard]) -> Iterator[str]:
    for field in ("documents", "tokens"):
        total = sum(getattr(part, field) for part in parts)
        if total != getattr(whole, field):
            yield f"{what} have {total} {field}, the split has {getattr(whole, field)}"


def _check_size(file: Path, stated_bytes: int, implied_bytes: int) -> None:
    if not file_kind.is_there(file):
        raise MissingFileError(f"{file} is missing; {REMEDY}")
    found = file.stat().st_size
    if found != stated_bytes or stated_bytes != implied_bytes:
        raise UserError(f"{file} has {found:,} bytes, expected {implied_bytes:,}; {REMEDY}")
