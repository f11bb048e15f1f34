"""Starts two processes on this machine that train one run, waits, and ends every process."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def run_together(
    commands: Sequence[Sequence[str]], devices: int, timeout_sec: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """Runs one process per command, each with this many CPU devices, and waits for all."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    assert f"device_count={devices}" in flags
    environment = {**os.environ, "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        # A process that waits for another may fill a pipe. No process here writes that much.
        outputs = [process.communicate(timeout=timeout_sec) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
