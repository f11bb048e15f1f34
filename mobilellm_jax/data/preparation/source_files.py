"""Stores a list of the sources' files with the tokens, and tells which files have changed since.

The manifest holds only a checksum of all names, sizes and times. It shows whether the sources have
changed. The list is used only to name the changed files in a message.
"""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mobilellm_jax.data.sources.finding import File
from mobilellm_jax.data.sources.source import Source
from mobilellm_jax.storage import rundir, strict_json

_NAME = "sources.json"
_SHOWN = 3

Listed = dict[str, tuple[int, str]]
"""Size and stamp of each file, by its path."""


def write_list(folder: Path, sources: Sequence[Source]) -> None:
    """Writes the list of the sources' files into `folder`."""
    listed = [_listed(source.files()) for source in sources]
    rundir.write_whole(folder / _NAME, json.dumps(listed))


def changed_files(folder: Path, sources: Sequence[Source]) -> str:
    """Returns a text that names the files that differ from the list in `folder`.

    The text is empty if no file differs, or if `folder` has no list. Older versions wrote no list.
    """
    file = folder / _NAME
    if not file.is_file():
        return ""
    before: list[Listed] = strict_json.as_type(strict_json.read(file), list[Listed])
    changes = [
        change
        for old, source in zip(before, sources, strict=False)
        for change in _changes(old, _listed(source.files()))
    ]
    more = f", and {len(changes) - _SHOWN:,} more" if len(changes) > _SHOWN else ""
    return ", ".join(changes[:_SHOWN]) + more


def _listed(files: Sequence[File]) -> Listed:
    return {file.path: (file.size_bytes, file.stamp) for file in files}


def _changes(old: Listed, new: Listed) -> Iterator[str]:
    for path in sorted(old.keys() | new.keys()):
        if path not in old:
            yield f"{path} is new"
        elif path not in new:
            yield f"{path} is gone"
        elif old[path][0] != new[path][0]:
            yield f"{path} has {new[path][0]:,} bytes and had {old[path][0]:,}"
        elif old[path][1] != new[path][1]:
            yield f"{path} was written again ({_times(path, old[path][1], new[path][1])})"


def _times(path: str, old: str, new: str) -> str:
    """Returns words for a message about a file with a new stamp and an unchanged size."""
    if not (old.isdecimal() and new.isdecimal()):
        return f"{old or 'no stamp'}; now {new or 'no stamp'}"
    before, now = (
        datetime.datetime.fromtimestamp(int(stamp) / 1e9).isoformat(" ") for stamp in (old, new)
    )
    seconds, nanoseconds = divmod(int(old), 10**9)
    return (
        f"at {now}, before that at {before}; the size is the same. If the contents are the same, "
        f"`touch -d @{seconds}.{nanoseconds:09d} '{path}'` restores the time"
    )
