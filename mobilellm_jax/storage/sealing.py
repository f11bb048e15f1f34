"""Folders that are complete or do not count: a manifest, written last, seals what is in them.

`manifest.json` names every file of the folder with its size and SHA-256, and carries whatever its
writer wants to say about them. A folder without one was never finished, wherever it lies: object
stores have no rename that a reader could rely on. One whose files are not those of its manifest is
damaged. The manifest holds a checksum of itself too, so that no byte under the folder can change
unnoticed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import strict_json

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20


class DamagedError(UserError):
    """A folder is not what was sealed; the message names it and what is wrong with it."""


class UnsealedError(DamagedError):
    """A folder has no manifest: whoever wrote it did not finish."""


def seal(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest over all files in `folder`; they are on disk when this returns.

    Args:
      folder: what is to be sealed; nothing may write to it any more.
      content: what the manifest says besides, in JSON's types.
    """
    files = sorted(_files(folder))
    with _threads(len(files)) as pool:
        found = pool.map(lambda name: _record(folder / name), files)
        records = dict(zip(files, found, strict=True))
    text = _text({**content, "files": records})
    # Without a rename: the store that has none makes a file whole at its close, and on a disk a
    # manifest that is not whole is no manifest, because its checksum is missing.
    with (folder / MANIFEST).open("wb") as file:
        file.write(text.encode())
        file.flush()
        if is_local(folder):
            os.fsync(file.fileno())
    for path in {(folder / name).parent for name in [*files, MANIFEST]}:
        sync_names(path)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a sealed folder, having checked it and nothing else.

    Raises:
      UnsealedError: if there is none.
      DamagedError: if it is not as it was written.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UnsealedError(f"{folder} is incomplete: it has no {MANIFEST}.") from error
    with contextlib.suppress(strict_json.JsonError):
        content = strict_json.parse(raw)
        if isinstance(content, dict) and _is_manifest(content, raw):
            return content
    raise DamagedError(f"{folder} is damaged: its {MANIFEST} is not as it was written.")


def check_sizes(folder: epath.Path) -> None:
    """Checks that all files are there, in their size; their contents are not read.

    Raises:
      UnsealedError: if the folder has no manifest.
      DamagedError: naming what is missing or of another size.
    """
    files = read_manifest(folder)["files"]
    _raise_damage(folder, [_wrong_size(folder / name, record) for name, record in files.items()])


def verify(folder: epath.Path, parts: Sequence[str] = ()) -> dict[str, Any]:
    """Reads all files, on all cores, and returns the manifest that they agree with.

    Args:
      folder: a sealed folder.
      parts: the folders in it that matter; none given, all of it.

    Raises:
      UnsealedError: if the folder has no manifest.
      DamagedError: naming every file that is missing or not what was sealed.
    """
    content = read_manifest(folder)
    wanted = {
        name: record
        for name, record in content["files"].items()
        if not parts or PurePosixPath(name).parts[0] in parts
    }

    def wrong(name: str) -> str | None:
        path, record = folder / name, wanted[name]
        problem = _wrong_size(path, record)
        if problem is None:
            try:
                found = _sha256(path)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
            if found != record["sha256"]:
                problem = f"{path} has SHA-256 {found}, but its manifest says {record['sha256']}"
        return problem

    with _threads(len(wanted)) as pool:
        _raise_damage(folder, list(pool.map(wrong, wanted)))
    return content


def sync_names(folder: epath.Path) -> None:
    """Makes the names in a local folder survive a power cut; object stores do by themselves."""
    if is_local(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_local(path: epath.Path) -> bool:
    """Returns whether `path` is on a file system, which has renames, and not an object store."""
    return "://" not in str(path)


def _files(folder: epath.Path) -> Iterator[str]:
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif path != folder / MANIFEST:
                yield str(PurePosixPath(str(path)).relative_to(str(folder)))


def _record(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": _sha256(path, to_disk=is_local(path))}


def _sha256(path: epath.Path, *, to_disk: bool = False) -> str:
    digest = hashlib.sha256()  # lets other threads run while it computes
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        if to_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _wrong_size(path: epath.Path, record: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().length
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:  # of a name that no file can have, for example
        return f"{strict_json.plain(str(path))} cannot be read: {error}"
    if size != record["bytes"]:
        return f"{path} has {size:,} bytes, but its manifest says {record['bytes']:,}"
    return None


def _raise_damage(folder: epath.Path, problems: Sequence[str | None]) -> None:
    if found := [problem for problem in problems if problem]:
        raise DamagedError(f"{folder} is damaged: {'; '.join(found)}.")


def _text(content: Mapping[str, Any]) -> str:
    """Returns the manifest's only spelling; the checksum is over the same text without it."""
    checksum = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=1, sort_keys=True) + "\n"


def _is_manifest(content: dict[str, Any], raw: bytes) -> bool:
    """Takes the checksum out of `content` and returns whether it is right, and no name escapes."""
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
