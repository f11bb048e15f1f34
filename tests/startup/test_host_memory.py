"""Tests that freed memory stays in the process, and that other C libraries are left alone."""

import ctypes
import subprocess
import sys
import types

import pytest

from mobilellm_jax.startup.host_memory import keep_freed_memory

# The program prints how much resident memory 64 blocks add while they live, and after they are
# freed. It uses 1 MiB of each block. It allocates in a thread, as XLA does. It is a separate
# process, because these settings cannot be undone.
PROGRAM = """
import ctypes, resource, sys, threading
from mobilellm_jax.startup.host_memory import keep_freed_memory, share_one_heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

if sys.argv[1] != "default":
    assert sys.argv[1] == "own heaps" or share_one_heap() is True
    assert keep_freed_memory() is True
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]

def allocate():
    before = resident()
    blocks = [c.malloc(int(sys.argv[2])) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    held = resident()
    for block in blocks:
        c.free(block)
    print(held - before, resident() - before)

thread = threading.Thread(target=allocate)
thread.start()
thread.join()
"""


def megabytes_held_and_left(mode: str, block_bytes: int = 1 << 20) -> tuple[int, int]:
    command = [sys.executable, "-c", PROGRAM, mode, str(block_bytes)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    held, left = map(int, found.stdout.split())
    return held, left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    held, left = megabytes_held_and_left("default")
    assert held >= 60
    assert left < 10
    held, left = megabytes_held_and_left("keep")
    assert held >= 60
    assert left >= 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
@pytest.mark.parametrize(("mode", "least"), [("keep", 60), ("own heaps", 0)])
def test_blocks_larger_than_the_heap_of_a_thread_stay_too(mode: str, least: int) -> None:
    held, left = megabytes_held_and_left(mode, 100 << 20)
    assert held >= 60
    assert least <= left < least + 30


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("the code called the C library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_a_c_library_may_lack_or_refuse_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace())  # musl
    assert keep_freed_memory() is False
    asked: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        asked[name] = value
        return 0 if name == -1 else 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() is False
    assert asked == {-4: 0, -1: -1}  # M_MMAP_MAX, M_TRIM_THRESHOLD; no call follows a refusal
