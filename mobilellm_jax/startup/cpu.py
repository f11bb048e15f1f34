"""Reads which instructions the CPU has."""

import functools
from pathlib import Path

INFORMATION = Path("/proc/cpuinfo")  # Only Linux has this file.


@functools.cache
def cpu_features() -> frozenset[str]:
    """Returns the kernel's names of the CPU's features, such as "avx2"; none outside Linux."""
    if not INFORMATION.is_file():
        return frozenset()
    lines = INFORMATION.read_text("utf-8", errors="replace").splitlines()
    # Arm writes "Features" where x86 writes "flags".
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())
