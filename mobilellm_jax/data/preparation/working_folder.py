"""Creates and locks the folder in which `prepare` works, next to the output."""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.data.preparation.parts import read_record
from mobilellm_jax.data.preparation.source_files import changed_files, write_list
from mobilellm_jax.data.preparation.workers import WORKERS_LOCK, wait_for_workers
from mobilellm_jax.data.sources.source import Source
from mobilellm_jax.data.token_stream import TOKENS
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.file_lock import FileLock, HeldError

_log = logging.getLogger(__name__)

OUTPUT = "output"  # The folder that becomes the output.
_JOB = "job.json"
_LOCK = "lock"


@contextlib.contextmanager
def working_folder(
    work: Path, settings: Mapping[str, Any], sources: Sequence[Source]
) -> Iterator[None]:
    """Creates the working folder, or reuses that of an earlier run, and locks it for this process.

    After an error, the folder stays for the next run if it contains a complete part.

    Raises:
      UserError: if another process works in the folder, or an earlier run had other settings.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    try:
        lock = FileLock(work / _LOCK)
    except HeldError as error:
        raise UserError(
            f"{work} is being written by another prepare ({error.text.strip()}); wait for it, or "
            "end it."
        ) from error
    with lock:
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        wait_for_workers(work / WORKERS_LOCK)
        for unfinished in work.glob("*/.*"):  # A killed process left these temporary files behind.
            unfinished.unlink()
        job = work / _JOB
        if not _has_parts(work):
            _empty(work)
        elif differing := settings_difference(
            read_record(job, dict[str, Any]), settings, changed_files(work / OUTPUT, sources)
        ):
            raise UserError(
                f"{work} holds an interrupted preparation with other settings ({differing}); "
                "use its settings to go on, or delete it, or name another output."
            )
        else:
            _log.info(f"Going on with the interrupted preparation in {work}.")
        for name in ("parts", "shards", OUTPUT):
            (work / name).mkdir(exist_ok=True)
        write_list(work / OUTPUT, sources)
        rundir.write_whole(job, json.dumps(settings, indent=2))
        try:
            yield
        except BaseException:
            if not _has_parts(work):
                shutil.rmtree(work)
            raise


def settings_difference(
    there: Mapping[str, Any], asked: Mapping[str, Any], changed: str = ""
) -> str:
    """Returns a text with the settings whose difference changes the result, or an empty text.

    If `on_bad_line` was "stop" in the earlier run, that run has left out no line. A run with "skip"
    may therefore continue its work. `changed` names the files of the sources that have changed.
    """
    return "; ".join(
        _difference(key, there.get(key), value, changed)
        for key, value in asked.items()
        if there.get(key) != value and (key, there.get(key)) != ("on_bad_line", "stop")
    )


def _difference(key: str, there: Any, asked: Any, changed: str) -> str:
    if key != "sources" or not isinstance(there, list):
        return f"{key}: there {there!r}, asked for {asked!r}"
    # The checksum of names, sizes and times tells the user nothing.
    before, now = (
        [str(line).partition(", SHA-256")[0] for line in each] for each in (there, asked)
    )
    if before != now:
        return f"{key}: there {before!r}, asked for {now!r}" + (changed and f" ({changed})")
    return f"{key}: {changed or 'the names or the times of files of ' + repr(now) + ' differ'}"


def _has_parts(work: Path) -> bool:
    return any(work.glob(f"*/*.{TOKENS}"))


def _empty(work: Path) -> None:
    """Deletes all files in `work` except the lock files."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_LOCK, WORKERS_LOCK):
            path.unlink()
