"""Tests SIGTERM while no step runs, in a separate process; tests/faults does it in real runs."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import ctypes, os, signal, sys, threading, time
from mobilellm_jax.processes.early_stop import FAREWELLS, EarlyStop
from mobilellm_jax.startup.messages import show_messages

show_messages()
farewell = FAREWELLS.during

def say(text):
    os.write(1, f"{text}\\n".encode())  # without a buffer, because several threads write

def refuse():
    raise OSError("no such file")

def in_python():
    say("ready")
    while True:
        time.sleep(0.01)

def in_c():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    say("ready")
    for _ in range(2):  # the second call waits for ever, in spite of signals
        libc.pthread_mutex_lock(mutex)

def in_the_loop():
    say("ready")
    old = signal.signal(signal.SIGTERM, lambda *_: say("the loop's own handler"))
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.2)
    signal.signal(signal.SIGTERM, old)

def just_before_the_loop():
    sys.setswitchinterval(1000)  # no other thread runs before this one sleeps
    say("ready")
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: say("the loop's own handler"))
    time.sleep(60)

def the_main_thread_fails():
    say("ready")
    with farewell(stopping.set), farewell(lambda: time.sleep(0.5)):
        stopping.wait()
        raise SystemExit(2)

stopping = threading.Event()
before = signal.getsignal(signal.SIGTERM)
with EarlyStop():
    with farewell(lambda: say("not said, it was over")):
        pass
    with farewell(lambda: say("first")), farewell(refuse), farewell(lambda: say("last")):
        globals()[sys.argv[1]]()
assert signal.getsignal(signal.SIGTERM) == before
say("came to its end")
"""


def life(kind: str, *, kill: bool = True) -> tuple[int, list[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        if kill:
            process.terminate()
        said, errors = process.stdout.read(), process.stderr.read()
    return process.returncode, said.splitlines(), errors


@pytest.mark.parametrize("kind", ["in_python", "in_c", "the_main_thread_fails"])
def test_the_process_ends_whatever_it_does(kind: str) -> None:
    code, said, errors = life(kind)
    assert (code, said) == (75, ["first", "last"])
    assert errors.splitlines() == [
        "SIGTERM: no step is running; stopping. Start the same command to resume.",
        "While stopping: OSError: no such file",
    ]


def test_a_signal_just_before_the_loop_takes_over_is_not_lost() -> None:
    code, said, _ = life("just_before_the_loop", kill=False)
    assert (code, said) == (75, ["first", "last"])


def test_in_the_loop_the_signal_is_the_loops() -> None:
    said = ["the loop's own handler", "came to its end"]
    assert life("in_the_loop", kill=False) == (0, said, "")
