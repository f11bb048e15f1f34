"""Trains one run of a sweep, or measures its speed in a trial, in a separate process.

    python -m mobilellm_jax.sweep.child run FOLDER NAME
    python -m mobilellm_jax.sweep.child trial FOLDER NAME

`--cores=0,1` restricts the process to these cores. The process applies `--cores` before jax starts
a backend, because a backend starts one thread per allowed core. With `--with_parent`, standard
input is a pipe from the parent process. When the pipe closes, this process saves its run and ends.
The operating system closes the pipe when the parent ends, even if the parent was killed.
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from mobilellm_jax import preflight
from mobilellm_jax.errors import SAVED_REQUEUE_ME, UserError
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.plan.compiled import batch_shapes
from mobilellm_jax.pretrain import pretrain
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.early_stop import EarlyStop
from mobilellm_jax.quantize.parameters import training_transform
from mobilellm_jax.startup.before_jax import before_jax
from mobilellm_jax.startup.host_memory import keep_freed_memory, peak_bytes
from mobilellm_jax.startup.messages import show_messages
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import init_state, mesh_of
from mobilellm_jax.train.step import make_train_step

_TRIAL_STEPS = 5


def main(arguments: list[str]) -> int:
    """Runs the command and returns the exit code."""
    show_messages()
    positional = [a for a in arguments if not a.startswith("--")]
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--cores":
            os.sched_setaffinity(0, {int(core) for core in value.split(",")})
        elif name == "--with_parent":
            threading.Thread(target=_end_with_parent, daemon=True).start()
    what, folder, name = positional
    with EarlyStop():
        return {"run": _run, "trial": _trial}[what](Path(folder), name)


def _end_with_parent() -> None:
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _run(sweep: Path, name: str) -> int:
    began = time.monotonic()
    folder = files.run_folder(sweep, name)
    run = files.find_run(sweep, name)
    try:
        config = files.settled(sweep, run)
        before_jax(deterministic=config.train.deterministic)
        distributed.start(num_processes=1)
        finished = pretrain(config, folder)
    except BaseException as error:
        # The sweep continues with its other runs. The log of this run contains the traceback.
        reason = f"{type(error).__name__}: {error}"
        files.write_outcome(folder, "failed", reason=reason[:2000])
        raise
    if not finished:
        return SAVED_REQUEUE_ME
    seconds = round(time.monotonic() - began, 1)
    steps = config.train.steps
    files.write_outcome(folder, "finished", steps=steps, last_life_sec=seconds, **_peaks())
    return 0


def _trial(sweep: Path, name: str) -> int:
    """Prints the median time of a step on random tokens, and the time until the first step ends.

    If the settings do not fit this machine, the function prints the reason instead.
    """
    config = files.find_run(sweep, name).config
    began = time.perf_counter()
    before_jax(deterministic=config.train.deterministic)
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
    config = settle(config, devices[0])
    try:
        preflight.check_memory(config)
        mesh, rules = mesh_of(config, devices)
    except UserError as error:
        print(json.dumps({"refused": str(error)}))
        return 0
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(config, optimizer, mesh, rules)
    step = make_train_step(config, optimizer, mesh, rules, state, training_transform(config))
    rng = np.random.default_rng(0)
    batch = {}
    for field, array in batch_shapes(config, mesh).items():
        values = np.ones(array.shape, array.dtype)
        if field in ("tokens", "targets"):
            values *= rng.integers(config.model.vocab_size, size=array.shape, dtype=array.dtype)
        batch[field] = jax.device_put(values, array.sharding)
    seconds = []
    for _ in range(1 + _TRIAL_STEPS):
        step_began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - step_began)
    start_sec = time.perf_counter() - began - sum(seconds[1:])
    print(json.dumps({"step_sec": statistics.median(seconds[1:]), "start_sec": start_sec}))
    return 0


def _peaks() -> dict[str, int]:
    peaks = {"peak_host_bytes": peak_bytes()}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["peak_device_bytes"] = int(stats["peak_bytes_in_use"])
    return peaks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
