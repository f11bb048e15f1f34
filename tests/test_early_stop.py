"""SIGTERM where no step is under way, in a process of its own; in real runs: faults/."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import ctypes, os, signal, sys, time
from mobilellm_jax import early_stop
from mobilellm_jax.early_stop import EarlyStop, Stopped

early_stop._UNWIND_SEC = float(sys.argv[2])

def say(text):
    os.write(1, f"{text}\\n".encode())  # at once, because threads say something

def in_python():
    try:
        say("ready")
        while True:
            time.sleep(0.01)
    finally:
        say("cleaned up")

def in_a_library():
    try:
        in_python()
    except Stopped:
        raise RuntimeError("what the library made of it") from None

def in_the_loop():
    say("ready")
    old = signal.signal(signal.SIGTERM, lambda *_: say("the loop's own handler"))
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.2)
    signal.signal(signal.SIGTERM, old)

def twice():
    try:
        in_python()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        say("cleaned up all")

def c_that_takes_long():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    say("ready")
    for _ in range(2):  # taken twice it waits for ever, whatever signals come
        libc.pthread_mutex_lock(mutex)

before = signal.getsignal(signal.SIGTERM)
with EarlyStop(lambda: say("told the others")) as stop:
    globals()[sys.argv[1]]()
assert stop.asked or signal.getsignal(signal.SIGTERM) == before
say(f"asked: {stop.asked}")
sys.exit(75 if stop.asked else 0)
"""


def life(kind: str, *, kill: bool = True, unwind_sec: float = 600) -> tuple[int, list[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, kind, str(unwind_sec)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        if kill:
            process.terminate()
        said, errors = process.stdout.read(), process.stderr.read()
    return process.returncode, said.splitlines(), errors


@pytest.mark.parametrize("kind", ["in_python", "in_a_library", "twice"])
def test_what_is_under_way_is_left_in_order(kind: str) -> None:
    code, said, errors = life(kind)
    assert code == 75, errors
    expected = ["cleaned up", *(["cleaned up all"] if kind == "twice" else []), "asked: True"]
    assert [line for line in said if line != "told the others"] == expected
    assert "told the others" in said
    assert "SIGTERM: no step is under way; stopping. The same command again goes on." in errors
    assert ("what the library made of it" in errors) == (kind == "in_a_library")


def test_nobody_waits_for_a_compiler() -> None:
    code, said, errors = life("c_that_takes_long", unwind_sec=0.1)
    assert (code, said) == (75, ["told the others"]), errors


def test_in_the_loop_the_signal_is_the_loops() -> None:
    assert life("in_the_loop", kill=False) == (0, ["the loop's own handler", "asked: False"], "")
