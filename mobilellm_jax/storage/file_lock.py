"""An advisory lock on a file, which the kernel releases when its holder dies (`flock`).

The package `filelock` has no lock that several processes share, and it does not let a caller keep a
text about the holder in the locked file.
"""

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class HeldError(RuntimeError):
    """Another process holds the lock; `text` is what the locked file says."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class FileLock:
    """A lock that this process holds until `release`, or until it dies; a missing file is created.

    Args:
      shared: several processes may hold the lock together, but not beside an exclusive holder.
      wait: wait until the lock is free, instead of raising a `HeldError`.
      required: raise an `OSError` if the file system has no locks; otherwise `works` says whether
        it has.
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
        """Replaces the text in place, because the lock belongs to the file and not to its name."""
        content = text.encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def release(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
