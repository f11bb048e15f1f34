"""Divides this machine's GPUs or CPU cores into slots for simultaneous runs."""

import dataclasses
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mobilellm_jax
from mobilellm_jax.config import ConfigError

PACKAGE_PARENT = str(Path(mobilellm_jax.__file__).parent.parent)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A part of the machine's devices; one run at a time is trained on it."""

    name: str
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()  # Additional arguments of the child process.

    def start(
        self, what: Literal["run", "trial"], sweep: Path, name: str, *flags: str, **options: Any
    ) -> "subprocess.Popen[bytes]":
        """Starts `child.py` for a run; `options` are arguments of `subprocess.Popen`."""
        child = [sys.executable, "-m", "mobilellm_jax.sweep.child", what, str(sweep), name]
        # The child must import the same package.
        paths = [PACKAGE_PARENT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        path = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        env = {**os.environ, **path, **self.environment}
        return subprocess.Popen([*child, *flags, *self.arguments], env=env, **options)


def find_slots(parallel: int | None, env: Mapping[str, str] = os.environ) -> list[Slot]:
    """Returns the slots; starts no backend, because a backend would reserve GPU memory.

    `parallel` is the number of slots. None means one slot per GPU, or one slot with all cores if
    the machine has no GPU.

    Raises:
      ConfigError: if the machine has fewer GPUs or cores than slots, or if the system cannot divide
        its cores.
    """
    gpus = [] if env.get("JAX_PLATFORMS") == "cpu" else _gpus(env)
    if gpus:
        count = parallel or len(gpus)
        return [
            Slot(f"GPU {','.join(part)}", {"CUDA_VISIBLE_DEVICES": ",".join(part)})
            for part in _divided(gpus, count, "GPUs")
        ]
    if not hasattr(os, "sched_getaffinity") or parallel in (None, 1):
        if (parallel or 1) > 1:
            raise ConfigError(
                f"--parallel={parallel}: this system cannot divide its cores; use --parallel=1."
            )
        return [Slot("this machine", {})]
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    return [
        Slot(f"cores {','.join(part)}", {}, (f"--cores={','.join(part)}",))
        for part in _divided(cores, parallel, "CPU cores")
    ]


def _divided(things: list[str], count: int, what: str) -> list[list[str]]:
    if count > len(things):
        raise ConfigError(
            f"--parallel={count} must be at most {len(things)}, the number of {what} here."
        )
    size = len(things) // count
    return [things[i * size : (i + 1) * size] for i in range(count)]


def _gpus(env: Mapping[str, str]) -> list[str]:
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        # CUDA ignores what follows an invalid name. "-1" and Slurm's "NoDevFiles" hide all GPUs.
        names = map(str.strip, env["CUDA_VISIBLE_DEVICES"].split(","))
        return list(itertools.takewhile(lambda name: re.match(r"\d|GPU-|MIG-", name), names))
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]
