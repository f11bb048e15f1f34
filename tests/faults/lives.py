"""Starts processes that train until they finish or a test kills them.

The forkserver of multiprocessing has imported every module and started no backend, so a process
starts in a fraction of a second. Each process runs the `main` of the command line.
"""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["mobilellm_jax.cli.train", "mobilellm_jax.pretrain", __name__])


def start(arguments: Sequence[str], output: Path, cache: Path) -> ForkServerProcess:
    """Starts `mobilellm train` with these arguments; its output goes to the end of `output`."""
    process = _server.Process(target=_live, args=(list(arguments), str(output), str(cache)))
    process.start()
    return process


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
        code = main(["train", *arguments])
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not call these functions
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 1:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
