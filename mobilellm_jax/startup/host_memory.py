"""Keeps freed host memory in the process, which XLA's CPU backend needs to be fast.

It allocates the temporaries of a step anew at every step. glibc hands blocks of that size back to
the kernel when they are freed, so each step faults all its pages in again; on a small model that
took longer than the arithmetic, and on one of 125M parameters a sixth of the step.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 64 << 20


def share_one_heap() -> bool:
    """Tells glibc to serve threads that start from now on from the main heap.

    Call it before XLA starts its threads: they would get heaps of their own, which hold 64 MB at
    most, and have everything larger mapped afresh whatever `keep_freed_memory` says. Returns
    whether the C library took it.
    """
    return _set((_M_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Tells glibc to allocate from its heap only and never to shrink it, for this process.

    Returns whether the C library took it; other systems' allocators are left as they are.
    """
    return _set((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))


def _set(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return all(mallopt(name, value) == 1 for name, value in settings)
