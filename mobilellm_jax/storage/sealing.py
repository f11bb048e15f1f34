"""Seals folders: a manifest, which is written last, makes a folder complete.

`manifest.json` lists every file of the folder with its size and SHA-256, and holds other facts that
the writer adds. A folder without a manifest is incomplete. This rule also works on object stores,
which cannot rename a folder. A folder is damaged if a file differs from the manifest. The manifest
also has a checksum of itself, so every changed byte in the folder is found.

The token folders of `data/shards.py` have a manifest of an older format. They share the functions
of this file that compute and compare checksums.
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
from mobilellm_jax.storage import strict_json

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20  # sha256_of reads so many bytes at once


class DamagedError(UserError):
    """A sealed folder has changed; the message names the folder and the differences."""


class UnsealedError(DamagedError):
    """A folder has no manifest, because its writer did not finish."""


def seal(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest over all files in `folder`; they are on disk when this returns.

    Nothing may write to the folder any more. `content` has other entries of the manifest.
    """
    files = sorted(_files(folder))

    def record(name: str) -> dict[str, Any]:
        path = folder / name
        return {"bytes": path.stat().length, "sha256": sha256_of(path, to_disk=is_local(path))}

    with _threads(len(files)) as pool:
        records = dict(zip(files, pool.map(record, files), strict=True))
    text = _text({**content, "files": records})
    # This write needs no rename. An object store shows a file only when it is closed. On a disk, a
    # manifest that was cut off has no valid checksum, so no reader accepts it.
    with (folder / MANIFEST).open("wb") as file:
        file.write(text.encode())
        file.flush()
        if is_local(folder):
            os.fsync(file.fileno())
    for path in {(folder / name).parent for name in [*files, MANIFEST]}:
        sync_names(path)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a sealed folder, after a check of the manifest alone."""
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
    """Compares the files on all cores with the manifest, and returns the manifest.

    `parts` names the subfolders to compare; an empty sequence means the whole folder. Without
    `contents`, only sizes are compared. A `DamagedError` names all missing and changed files.
    """
    content = read_manifest(folder)
    wanted = {
        folder / name: record
        for name, record in content["files"].items()
        if not parts or PurePosixPath(name).parts[0] in parts
    }

    def wrong(path: epath.Path) -> str:
        record = wanted[path]
        try:
            size = path.stat().length
            if size != record["bytes"]:
                return f"{path} has {size:,} bytes, but its manifest says {record['bytes']:,}"
            if contents and (found := sha256_of(path)) != record["sha256"]:
                return f"{path} has SHA-256 {found}, but its manifest says {record['sha256']}"
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, ValueError) as error:  # for example, a name that no file can have
            return f"{strict_json.plain(str(path))} cannot be read: {error}"
        return ""

    with _threads(len(wanted)) as pool:
        if problems := "; ".join(filter(None, pool.map(wrong, wanted))):
            raise DamagedError(f"{folder} is damaged: {problems}.")
    return content


def sync_names(folder: epath.Path) -> None:
    """Makes the file names in a local folder survive a power cut; object stores need no call."""
    if is_local(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_local(path: epath.Path) -> bool:
    """Returns whether `path` is on a file system, which can rename, or in an object store."""
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

    Other threads can run meanwhile, because hashlib releases Python's lock. `to_disk` also writes
    the file from the system's memory to the disk. `look` gets each block of the file, in order.
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
    """Returns the text of a manifest; its checksum covers the same text without the checksum."""
    checksum = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=1, sort_keys=True) + "\n"


def _is_manifest(content: dict[str, Any], raw: bytes) -> bool:
    """Removes the checksum from `content`; returns whether it is right and names stay inside."""
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
