"""Starts processes that run a command of `mobilellm` until it ends or a test kills it.

The forkserver of multiprocessing has imported every module and started no backend, so a process
starts in a fraction of a second. Each process runs the `main` of the command line.
"""

import atexit
import gc
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# The server imports this file. As in conftest.py, Python looks for garbage less often.
gc.set_threshold(200_000, 50, 1000)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("mobilellm_jax.cli.main", "mobilellm_jax.cli.train", "mobilellm_jax.pretrain", __name__),
        # A run imports these when it writes its first record and picture.
        *("matplotlib.style", "matplotlib.figure", "matplotlib.backends.backend_agg"),
        "tensorboard.plugins.hparams.summary_v2",
        "tensorboard.summary.writer.record_writer",
    ]
)


def start(
    arguments: Sequence[str],
    output: Path,
    cache: Path | None = None,
    *,
    devices: int = 1,
    before: Callable[[], object] = bool,
) -> ForkServerProcess:
    """Starts `mobilellm` with these arguments, and appends what it says to `output`.

    Args:
      arguments: The command and its flags.
      output: A file. The process creates it.
      cache: A folder of compiled programs; None means that of the session.
      devices: The number of CPU devices of the process.
      before: The process calls this function first. It must be picklable.
    """
    folder = str(cache or os.environ["MOBILELLM_TEST_CACHE"])
    life = (list(arguments), str(output), folder, devices, before)
    process = _server.Process(target=_live, args=life)
    process.start()
    return process


def run(arguments: Sequence[str], output: Path) -> "subprocess.CompletedProcess[str]":
    """Runs `mobilellm` to its end; `stderr` of the result is all that this process said."""
    begin = output.stat().st_size if output.exists() else 0
    process = start(arguments, output)
    process.join()
    assert process.exitcode is not None
    said = output.read_bytes()[begin:].decode()
    return subprocess.CompletedProcess(list(arguments), process.exitcode, stderr=said)


def run_as_two(
    commands: Sequence[Sequence[str]],
    folder: Path,
    befores: Sequence[Callable[[], object]] = (bool, bool),
) -> "list[subprocess.CompletedProcess[str]]":
    """Runs two processes of four devices together; one that hangs is killed after 240 s."""
    outputs = [folder / f"process{own}.log" for own in range(len(commands))]
    for output in outputs:
        output.unlink(missing_ok=True)
    processes = [
        start(command, output, devices=4, before=before)
        for command, output, before in zip(commands, outputs, befores, strict=True)
    ]
    for process in processes:
        process.join(240)
        process.kill()
        process.join()
    return [
        subprocess.CompletedProcess(command, process.exitcode or 0, stderr=output.read_text())
        for command, process, output in zip(commands, processes, outputs, strict=True)
    ]


def _live(
    arguments: list[str], output: str, cache: str, devices: int, before: Callable[[], object]
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = flags.replace("device_count=8", f"device_count={devices}")
    import jax

    from mobilellm_jax.cli.main import main

    # Later processes find the programs that the first process compiled.
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    code = 1
    try:
        before()
        code = main(arguments)
    except BaseException as error:
        # The interpreter does the same before it calls the functions at exit, and one of ours reads
        # `last_value`.
        sys.last_value = error
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not call these functions
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
