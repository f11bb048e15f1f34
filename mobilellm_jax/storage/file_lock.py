"""Locks files with `flock`; the kernel releases the lock of a process that ends.

The package `filelock` offers no shared locks, and its callers cannot store a text about the holder
in the locked file.
"""

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class HeldError(RuntimeError):
    """Another process holds the lock; `text` is the content of the locked file."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class FileLock:
    """A file lock. The process holds it until it calls `release` or ends.

    Args:
      shared: several processes can hold a shared lock, but not while one holds an exclusive lock.
      wait: wait until the lock is free; if False, raise a `HeldError` instead.
      required: raise an `OSError` if the file system has no locks; if False, set `works` to False
        instead.
    """

    def __init__(
        self, path: Path, *, shared: bool = False, wait: bool = False, required: bool = True
    ) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.works = True
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            text = self.read()
            self.release()
            raise HeldError(text) from None
        except OSError as error:
            if required or error.errno not in _NO_LOCKS:
                self.release()
                raise
            self.works = False

    def read(self) -> str:
        return os.pread(self.descriptor, 1 << 16, 0).decode("utf-8", "replace")

    def write(self, text: str) -> None:
        """Replaces the text in place, because a new file under this name would have no lock."""
        content = text.encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def release(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
