"""Tells how much memory a process may use, and keeps freed memory in the process.

Memory that stays in the process makes XLA's CPU backend faster.

XLA allocates its temporary arrays again in every step. glibc returns freed blocks of that size to
the kernel, so every step causes page faults for all its memory. On a small model the page faults
took longer than the arithmetic. With 125M parameters they took a sixth of the time of a step.
"""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 64 << 20
_CGROUPS = Path("/sys/fs/cgroup")


def share_one_heap() -> bool:
    """Tells glibc to use its main heap for all later threads; returns whether that worked.

    Call this function before XLA starts its threads. Otherwise each thread gets a separate heap of
    at most 64 MB. glibc then asks the kernel for larger blocks, in spite of `keep_freed_memory`.
    """
    return _set((_M_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Makes glibc allocate only from a heap that never shrinks; returns whether that worked."""
    return _set((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))


def usable_bytes() -> int:
    """Returns the memory of this machine, or less if its container or its Slurm job has a limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits()])


def peak_bytes() -> int:
    """Returns the largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, not KiB.


def _limits(groups: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> Iterator[int]:
    """Yields the limits of the control groups of this process, which only Linux has."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # Version 2 of control groups.
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit holds for all groups below. A container may not see the groups above its own.
        own = top / name.lstrip("/")
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # No limit is written as "max".
                yield int((folder / file).read_text())
            if folder == top:
                break


def _set(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # The C library musl has no mallopt.
    if mallopt is None:
        return False
    return all(mallopt(name, value) == 1 for name, value in settings)
