"""Token shards: the folder that `prepare` writes and training reads.

    manifest.json                   what is here; written last, so it makes the folder complete
    tokenizer.model | tokenizer.json
    SPLIT-00000-of-000NN.tokens     ids, little-endian uint16 (uint32 from vocabulary 65,536)
    SPLIT-00000-of-000NN.offsets    where each document starts in that shard, little-endian uint64
    SPLIT-00000-of-000NN.loss_mask  uint8 per token: 0 if it is no target; only where any is not

A document lies in one shard, as BOS tokens EOS. The shards of a split, one after the other, are its
stream (`token_stream.py`), in which the sources follow one another as the manifest lists them.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_jax import rundir
from mobilellm_jax.data.token_stream import ShardFiles, TokenStream

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
UINT32_VOCABULARY = 65_536

TOKENS, OFFSETS, LOSS_MASK = "tokens", "offsets", "loss_mask"
_SHARD_NAME = re.compile(r"[a-z_]+-\d{5,}-of-\d{5,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksum of a file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The files `name`.tokens, `name`.offsets and perhaps `name`.loss_mask."""

    name: str
    documents: int
    tokens: int
    files: Mapping[str, FileRecord]  # by suffix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """`text_bytes` counts the UTF-8 bytes of the documents; `tokens` includes BOS and EOS."""

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
    """A split's totals and its shards in the order of the stream."""

    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What one source gave; `weight` is its share of training, None for as much as there is.

    `bad_lines` lists what `--on_bad_line=skip` left out: file, line, byte_offset and reason each.
    """

    spec: str
    weight: float | None
    splits: Mapping[str, Counts]
    empty_documents: int
    bad_lines: tuple[Mapping[str, Any], ...]


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
    sources: tuple[SourceRecord, ...]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """An opened folder of token shards."""

    path: Path
    manifest: Manifest
    tokenizer: Path
    splits: Mapping[str, TokenStream]

    def source_stream(self, split: str, source: int) -> TokenStream:
        """Returns the part of a split's stream that source number `source` gave; maybe nothing."""
        counts = [record.splits.get(split, Counts()) for record in self.manifest.sources]
        start = sum(each.tokens for each in counts[:source])
        stop = start + counts[source].tokens
        return self.splits[split].view(start, stop, counts[source].documents)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of what training reads; where the folder lies and when it was made is not."""
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
            implied = {
                TOKENS: shard.tokens * itemsize,
                OFFSETS: shard.documents * 8,
                LOSS_MASK: shard.tokens,
            }
            for suffix, record in shard.files.items():
                _check_size(path / f"{shard.name}.{suffix}", record.bytes, implied[suffix])
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
        name: TokenStream(
            path,
            [ShardFiles(s.name, s.tokens, LOSS_MASK in s.files) for s in split.shards],
            np.dtype(manifest.dtype),
            split.documents,
        )
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
        version = values["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {_REMEDY}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={version} must be {FORMAT_VERSION}; "
            "prepare the data again with this version of mobilellm."
        )
    try:
        manifest = _manifest(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {_REMEDY}") from error
    for problem in _contradictions(manifest):
        raise ValueError(f"{file} is damaged ({problem}); {_REMEDY}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes `folder`."""
    rundir.write_whole(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def verify_checksums(dataset: Dataset) -> None:
    """Reads every shard on all cores, with a progress bar on a terminal, and compares checksums.

    Raises:
      ValueError: naming the first file that differs.
    """
    files = [
        (dataset.path / f"{shard.name}.{suffix}", record)
        for split in dataset.manifest.splits.values()
        for shard in split.shards
        for suffix, record in shard.files.items()
    ]
    total = sum(record.bytes for _, record in files)
    bar = tqdm(total=total, desc="checking data", unit="B", unit_scale=True, disable=None)
    # hashlib lets other threads run while it computes.
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, record), found in zip(
            files, pool.map(sha256_of, [file for file, _ in files]), strict=True
        ):
            if found != record.sha256:
                pool.shutdown(cancel_futures=True)
                raise ValueError(
                    f"{file} has SHA-256 {found}, but the manifest says {record.sha256}; {_REMEDY}"
                )
            bar.update(record.bytes)


def sha256_of(file: Path) -> str:
    """Returns the hexadecimal checksum of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


_REMEDY = "the folder is damaged: delete it and prepare it again."


def _manifest(values: Mapping[str, Any]) -> Manifest:
    """Returns `values` as dataclasses; their constructors know which fields there must be."""
    splits = {}
    for name, split in values["splits"].items():
        shards = tuple(
            Shard(**{**s, "files": {k: FileRecord(**f) for k, f in s["files"].items()}})
            for s in split["shards"]
        )
        splits[name] = Split(**{**split, "shards": shards})
    sources = tuple(
        SourceRecord(
            **{
                **source,
                "splits": {name: Counts(**c) for name, c in source["splits"].items()},
                "bad_lines": tuple(source["bad_lines"]),
            }
        )
        for source in values["sources"]
    )
    return Manifest(**{**values, "splits": splits, "sources": sources})


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yields what cannot be true of a manifest that `prepare` wrote."""
    if manifest.tokenizer not in rundir.TOKENIZER_FILES:
        yield f"tokenizer={manifest.tokenizer!r} is not one of {', '.join(rundir.TOKENIZER_FILES)}"
    if manifest.dtype not in ("uint16", "uint32"):
        yield f"dtype={manifest.dtype!r} is neither uint16 nor uint32"
    for name, split in manifest.splits.items():
        for shard in split.shards:
            # A name with a slash would read outside of the folder.
            if not _SHARD_NAME.fullmatch(shard.name):
                yield f"{shard.name!r} is no name of a shard"
            if not {TOKENS, OFFSETS} <= shard.files.keys() <= {TOKENS, OFFSETS, LOSS_MASK}:
                yield f"shard {shard.name} has files {', '.join(shard.files)}"
        yield from _unequal(f"{name} shards", split, split.shards)
        of_sources = [source.splits.get(name, Counts()) for source in manifest.sources]
        yield from _unequal(f"{name} of the sources", split, of_sources)


def _unequal(what: str, whole: Counts, parts: Sequence[Counts | Shard]) -> Iterator[str]:
    for field in ("documents", "tokens"):
        total = sum(getattr(part, field) for part in parts)
        if total != getattr(whole, field):
            yield f"{what} have {total} {field}, the split has {getattr(whole, field)}"


def _check_size(file: Path, stated_bytes: int, implied_bytes: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {_REMEDY}")
    found = file.stat().st_size
    if found != stated_bytes or stated_bytes != implied_bytes:
        raise ValueError(f"{file} has {found:,} bytes, expected {implied_bytes:,}; {_REMEDY}")
