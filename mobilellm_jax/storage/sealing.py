"""Seals folders: the last file that `seal` writes, a manifest, makes a folder complete.

`manifest.json` lists every file of the folder with its size and SHA-256, and holds other facts that
the writer adds. A folder without a manifest is incomplete. This rule also works on object stores,
although they cannot rename a folder. A folder is damaged if a file differs from the manifest. The
manifest also has a checksum of itself, so a reader finds every changed byte in the folder.

The token folders of `data/shards.py` have a manifest of an older format. `data/` computes its
checksums with `sha256_of` as well.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind, strict_json
from mobilellm_jax.storage.unknown_owners import accept_unknown_owners

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20  # Number of bytes that sha256_of reads at once.

accept_unknown_owners()  # Whoever reads or writes a checkpoint imports this module.


class DamagedError(UserError):
    """A sealed folder has changed; the message names the folder and the differences."""


class UnsealedError(DamagedError):
    """A folder has no manifest, because the process that wrote it did not finish."""


def seal(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of `folder`; returns when all files of the folder are on disk.

    No one may write to the folder afterwards. `content` has more entries for the manifest.
    """
    files = sorted(_files(folder))

    def record(name: str) -> dict[str, Any]:
        path = folder / name
        return {"bytes": path.stat().length, "sha256": sha256_of(path, to_disk=is_local(path))}

    with _threads(len(files)) as pool:
        records = dict(zip(files, pool.map(record, files), strict=True))
    text = _text({**content, "files": records})
    # This write needs no temporary name. An object store shows a file only after it is closed. On a
    # disk, an incomplete manifest has no valid checksum, so readers refuse it.
    with (folder / MANIFEST).open("wb") as file:
        file.write(text.encode())
        file.flush()
        if is_local(folder):
            os.fsync(file.fileno())
    for path in {(folder / name).parent for name in [*files, MANIFEST]}:
        sync_names(path)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a sealed folder; checks the manifest, but no other file."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UnsealedError(f"{folder} is incomplete: it has no {MANIFEST}.") from error
    with contextlib.suppress(strict_json.JsonError):
        content = strict_json.parse(raw)
        if isinstance(content, dict) and _is_manifest(content, raw):
            return content
    raise DamagedError(f"{folder} is damaged: its {MANIFEST} has changed since it was written.")


def verify(
    folder: epath.Path, parts: Sequence[str] = (), *, contents: bool = True
) -> dict[str, Any]:
    """Compares the files with the manifest, on all CPU cores; returns the manifest.

    `parts` names the subfolders to compare; an empty sequence means the whole folder. Without
    `contents`, the function compares only sizes. A `DamagedError` names all missing and all
    changed files.
    """
    content = read_manifest(folder)
    wanted = {
        name: record
        for name, record in content["files"].items()
        if not parts or PurePosixPath(name).parts[0] in parts
    }

    def wrong(name: str) -> str:
        path, record = folder / name, wanted[name]
        try:
            size = path.stat().length
            if size != record["bytes"]:
                with path.open("rb") as file:
                    first = file.read(file_kind.FIRST_BYTES)
                if kind := file_kind.stand_in(first):
                    return f"{path} is {kind.name} ({kind.remedy})"
                return f"{path} has {size:,} bytes, but its manifest says {record['bytes']:,}"
            if contents and (found := sha256_of(path)) != record["sha256"]:
                return f"{path} has SHA-256 {found}, but its manifest says {record['sha256']}"
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, ValueError) as error:  # For example, a name that no file can have.
            return f"{folder}/{strict_json.plain(name)} cannot be read: {error}"
        return ""

    with _threads(len(wanted)) as pool:
        if problems := "; ".join(filter(None, pool.map(wrong, wanted))):
            raise DamagedError(f"{folder} is damaged: {problems}.")
    return content


def sync_names(folder: epath.Path) -> None:
    """Makes the file names in a local folder survive a power cut; does nothing for a URL."""
    if is_local(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_local(path: epath.Path) -> bool:
    """Returns True if `path` is on a file system, and False if it is in an object store."""
    return "://" not in str(path)


def _files(folder: epath.Path) -> Iterator[str]:
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif path != folder / MANIFEST:
                yield str(PurePosixPath(str(path)).relative_to(str(folder)))


def sha256_of(
    path: epath.Path | Path,
    *,
    to_disk: bool = False,
    look: Callable[[bytes], None] = lambda block: None,
) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits.

    Other threads can run at the same time, because hashlib releases Python's global lock. `to_disk`
    also flushes the file to the disk (fsync). The function calls `look` with each block, in order.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            look(block)
        if to_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    """Returns `content` as JSON with a checksum; the checksum is that of the JSON without it."""
    checksum = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=1, sort_keys=True) + "\n"


def _is_manifest(content: dict[str, Any], raw: bytes) -> bool:
    """Removes the checksum from `content`; returns whether the checksum and all names are valid."""
    if not content.pop("sha256", None) or raw != _text(content).encode():
        return False
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(record, dict)
        and isinstance(record.get("bytes"), int)
        and isinstance(record.get("sha256"), str)
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, record in files.items()
    )


def _threads(tasks: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(tasks, os.cpu_count() or 1)))
