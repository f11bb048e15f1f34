"""Starts processes that run a command of `mobilellm` until it ends or a test kills it.

The forkserver of multiprocessing has imported every module and started no backend, so a process
starts in a fraction of a second. Each process runs the `main` of the command line.
"""

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["mobilellm_jax.cli.train", "mobilellm_jax.pretrain", __name__])


def start(arguments: Sequence[str], output: Path, cache: Path | None = None) -> ForkServerProcess:
    """Starts `mobilellm` with these arguments on one device; appends what it says to `output`.

    Args:
      arguments: The command and its flags.
      output: A file. The process creates it.
      cache: A folder of compiled programs; None means that of the session.
    """
    folder = str(cache or os.environ["MOBILELLM_TEST_CACHE"])
    process = _server.Process(target=_live, args=(list(arguments), str(output), folder))
    process.start()
    return process


def run(arguments: Sequence[str], output: Path) -> "subprocess.CompletedProcess[str]":
    """Runs `mobilellm` to its end; `stderr` of the result is all that this process said."""
    before = output.stat().st_size if output.exists() else 0
    process = start(arguments, output)
    process.join()
    assert process.exitcode is not None
    said = output.read_bytes()[before:].decode()
    return subprocess.CompletedProcess(list(arguments), process.exitcode, stderr=said)


def _live(arguments: list[str], output: str, cache: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    quick = os.environ["XLA_FLAGS"].split()[1:]  # without the flag for eight devices
    os.environ["XLA_FLAGS"] = " ".join(quick)
    import jax

    from mobilellm_jax.cli.main import main

    # Later processes find the programs that the first process compiled.
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    code = 1
    try:
        code = main(arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not call these functions
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 1:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
