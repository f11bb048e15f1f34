"""Token shards: the folder that `prepare` writes and training reads.

    manifest.json                     what is here; written last, so it makes the folder complete
    tokenizer.model | tokenizer.json
    SPLIT-00000-of-000NN.tokens       ids, little-endian uint16 (uint32 from vocabulary 65,536)
    SPLIT-00000-of-000NN.offsets      where each document starts in that shard, little-endian uint64

A document lies in one shard, as BOS tokens EOS. The shards of a split, one after the other, are its
stream; `TokenStream` is a view of that stream which maps the files instead of reading them.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax import rundir

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UINT32_VOCABULARY = 65_536

_OFFSET_DTYPE = np.dtype("<u8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One pair of files, `name`.tokens and `name`.offsets."""

    name: str
    documents: int
    tokens: int
    tokens_bytes: int
    tokens_sha256: str
    offsets_bytes: int
    offsets_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """`text_bytes` counts the UTF-8 bytes of the documents; `tokens` includes BOS and EOS."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a folder of token shards; `settings` is what `prepare` was asked for."""

    format_version: int
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str
    splits: Mapping[str, Split]
    sources: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """An opened folder of token shards."""

    path: Path
    manifest: Manifest
    tokenizer: Path
    splits: Mapping[str, "TokenStream"]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the type of ids on disk."""
    return np.dtype("<u2" if vocab_size < UINT32_VOCABULARY else "<u4")


def open_tokens(path: Path) -> Dataset:
    """Opens a complete folder; checks every file's size and the tokenizer's checksum.

    Raises:
      FileNotFoundError: if the folder, its manifest or a file that it lists is missing.
      ValueError: if a file does not have the size or checksum that the manifest states.
    """
    manifest = read_manifest(path)
    itemsize = np.dtype(manifest.dtype).itemsize
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_size(path / f"{shard.name}.tokens", shard.tokens_bytes, shard.tokens * itemsize)
            _check_size(path / f"{shard.name}.offsets", shard.offsets_bytes, shard.documents * 8)
    tokenizer = path / manifest.tokenizer
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} is missing; {_REMEDY}")
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    if found != manifest.tokenizer_sha256:
        raise ValueError(
            f"{tokenizer} has SHA-256 {found}, but the tokens were made with "
            f"{manifest.tokenizer_sha256}; {_REMEDY}"
        )
    splits = {
        name: TokenStream(path, split, np.dtype(manifest.dtype))
        for name, split in manifest.splits.items()
    }
    return Dataset(path=path, manifest=manifest, tokenizer=tokenizer, splits=splits)


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest of a folder, its form checked but not the files that it lists.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged or of another format version.
    """
    file = path / MANIFEST
    if not file.is_file():
        state = "is incomplete: it has no" if path.is_dir() else "does not exist, so there is no"
        raise FileNotFoundError(
            f"Token folder {path} {state} {MANIFEST}. Make it with "
            f"`mobilellm prepare --source=... --output={path}`."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format_version={values['format_version']} must be {FORMAT_VERSION}; "
                "prepare the data again with this version of mobilellm."
            )
        values["splits"] = {
            name: Split(**{**split, "shards": tuple(Shard(**s) for s in split["shards"])})
            for name, split in values["splits"].items()
        }
        return Manifest(**{**values, "sources": tuple(values["sources"])})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {_REMEDY}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes `folder`."""
    rundir.write_whole(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def verify_checksums(dataset: Dataset) -> None:
    """Reads every shard and compares its checksum.

    Raises:
      ValueError: naming the first file that differs.
    """
    for split in dataset.manifest.splits.values():
        for shard in split.shards:
            for suffix, expected in (
                ("tokens", shard.tokens_sha256),
                ("offsets", shard.offsets_sha256),
            ):
                file = dataset.path / f"{shard.name}.{suffix}"
                with file.open("rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
                if found != expected:
                    raise ValueError(
                        f"{file} has SHA-256 {found}, but the manifest says {expected}; {_REMEDY}"
                    )


class TokenStream:
    """The tokens of a split from 0 to `tokens`, over all its shards."""

    def __init__(self, path: Path, split: Split, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.tokens = split.tokens
        self.documents = split.documents
        self._dtype = dtype
        self._shards = split.shards
        ends = np.cumsum([shard.tokens for shard in split.shards], dtype=np.int64)
        self._starts: list[int] = [0, *(int(end) for end in ends)]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop), which must lie in the stream; a copy only if it must be."""
        assert 0 <= start <= stop <= self.tokens, f"[{start}, {stop}) not in [0, {self.tokens})"
        parts = [
            self._maps[shard][0][low - base : high - base]
            for shard, base, low, high in self._overlaps(start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions in [start, stop) where documents start (their BOS), ascending."""
        found = []
        for shard, base, low, high in self._overlaps(start, stop):
            offsets = self._maps[shard][1]
            first, last = np.searchsorted(offsets, np.array([low - base, high - base], np.uint64))
            found.append(offsets[first:last].astype(np.int64) + base)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    @functools.cached_property
    def _maps(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Token and offset files as plain arrays, which slice faster than `np.memmap` does."""
        return [
            (
                np.asarray(np.memmap(self.path / f"{s.name}.tokens", self._dtype, mode="r")),
                np.asarray(np.memmap(self.path / f"{s.name}.offsets", _OFFSET_DTYPE, mode="r")),
            )
            for s in self._shards
        ]

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Returns (shard, its first position, low, high) for every shard that meets the range."""
        overlaps = []
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            base, end = self._starts[shard], min(stop, self._starts[shard + 1])
            overlaps.append((shard, base, start, end))
            start, shard = end, shard + 1
        return overlaps


class SplitWriter:
    """Writes the shards of one split; a shard ends with the document that fills it."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._text_bytes = 0
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._offsets: list[int] = []
        self._tokens = 0

    def add(self, ids: NDArray[Any], text_bytes: int) -> None:
        """Appends a document: `ids` with BOS and EOS, of a text of `text_bytes` bytes."""
        if self._file is None:
            self._file = self._temporary(len(self._shards), "tokens").open("wb")
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._offsets.append(self._tokens)
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        if self._tokens >= self._shard_tokens:
            self._end_shard()

    def close(self) -> Split:
        """Ends the last shard and gives all files their final names."""
        self._end_shard()
        named = []
        for index, shard in enumerate(self._shards):
            name = f"{self._split}-{index:05d}-of-{len(self._shards):05d}"
            for suffix in ("tokens", "offsets"):
                os.replace(self._temporary(index, suffix), self._folder / f"{name}.{suffix}")
            named.append(dataclasses.replace(shard, name=name))
        return Split(
            documents=sum(shard.documents for shard in named),
            tokens=sum(shard.tokens for shard in named),
            text_bytes=self._text_bytes,
            shards=tuple(named),
        )

    def abandon(self) -> None:
        """Closes the open file; what was written is the caller's to remove."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        offsets = np.array(self._offsets, _OFFSET_DTYPE).tobytes()
        rundir.write_whole(self._temporary(len(self._shards), "offsets"), offsets)
        self._shards.append(
            Shard(
                name="",
                documents=len(self._offsets),
                tokens=self._tokens,
                tokens_bytes=self._tokens * self._dtype.itemsize,
                tokens_sha256=self._hash.hexdigest(),
                offsets_bytes=len(offsets),
                offsets_sha256=hashlib.sha256(offsets).hexdigest(),
            )
        )
        self._file, self._hash, self._offsets, self._tokens = None, hashlib.sha256(), [], 0

    def _temporary(self, index: int, suffix: str) -> Path:
        """How many shards there are, which the names state, is known only at the end."""
        return self._folder / f".{self._split}-{index:05d}.{suffix}"


_REMEDY = "the folder is damaged: delete it and prepare it again."


def _check_size(file: Path, stated_bytes: int, implied_bytes: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {_REMEDY}")
    found = file.stat().st_size
    if found != stated_bytes or stated_bytes != implied_bytes:
        raise ValueError(f"{file} has {found:,} bytes, expected {implied_bytes:,}; {_REMEDY}")
