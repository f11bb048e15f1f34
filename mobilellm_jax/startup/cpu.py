"""Reads which instructions the CPU has, and how many cores this process may use."""

import functools
import os
from pathlib import Path

INFORMATION = Path("/proc/cpuinfo")  # Only Linux has this file.


@functools.cache
def cpu_features() -> frozenset[str]:
    """Returns Linux's names of the CPU's features, such as "avx2"; no names on other systems."""
    if not INFORMATION.is_file():
        return frozenset()
    lines = INFORMATION.read_text("utf-8", errors="replace").splitlines()
    # Arm writes "Features" where x86 writes "flags".
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())


def available_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
