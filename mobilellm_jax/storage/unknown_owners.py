"""Repairs etils, which cannot look at a file if the system knows no name for its owner."""

import os
import stat

from etils.epath import backend
from etils.epath.stat_utils import StatResult


def accept_unknown_owners() -> None:
    """Lets etils look at files whose owner or group has no name.

    Such files are common in containers (`docker --user`), on NFS and in restored archives. For each
    local file, etils 1.15.0 looks up the names and raises a `KeyError` if one is missing. This
    package, Orbax, TFDS and the compilation cache of jax look at files through etils, and none of
    them needs the names. Remove this file when the issue is closed:
    https://github.com/google/etils/issues/790.
    """
    backend.os_backend.stat = _stat


def _stat(path: str) -> StatResult:
    found = os.stat(path)
    return StatResult(
        is_directory=stat.S_ISDIR(found.st_mode),
        length=found.st_size,
        mtime=int(found.st_mtime),
        mode=found.st_mode,
    )
