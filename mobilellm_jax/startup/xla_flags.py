"""Sets the flags of XLA's compilers; no other file of this package sets such flags.

XLA reads `XLA_FLAGS` once, when the first backend starts, and ends the process if it does not know
a flag. So call `set_xla_flags` before a backend starts. It sets only the flags below, and only if
the version of jaxlib is tested. The flags of the user take precedence.

| device | flag | reason |
|---|---|---|
| GPU | `xla_gpu_enable_latency_hiding_scheduler=true` | overlaps collectives and computation;
  NVIDIA sets this flag in its JAX images; it has no effect on a single GPU |
| GPU | `xla_gpu_deterministic_ops=true` | only with `train.deterministic`: no atomics, cuDNN's
  deterministic attention, no choice of kernels by timing |

For TPU, this file sets no flags (`LIBTPU_INIT_ARGS`), because they brought no gain in measurements.
For CPU, it sets no flags either. TPU and CPU are deterministic without flags.
"""

import importlib.util
import os
from importlib import metadata

from mobilellm_jax.config import ConfigError

_GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
_GPU_DETERMINISTIC = {"xla_gpu_deterministic_ops": "true"}
_TESTED_JAXLIB = ("0.10.", "0.11.")  # tests/startup/test_xla_flags.py uses the installed one.
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def set_xla_flags(*, deterministic: bool) -> str:
    """Adds the flags for the accelerator of this machine to `XLA_FLAGS`; returns what it added.

    Raises:
      ConfigError: if the user's `XLA_FLAGS` contradict `train.deterministic`, or if
        `train.deterministic` needs a version of jaxlib that was not tested.
    """
    if not any(map(importlib.util.find_spec, _GPU_PLUGINS)):
        return "none"
    given = _given()
    if deterministic and "xla_gpu_deterministic_ops" in given and not is_deterministic():
        raise ConfigError(
            "train.deterministic=True contradicts XLA_FLAGS=--xla_gpu_deterministic_ops="
            f"{given['xla_gpu_deterministic_ops']}; remove one of them."
        )
    version = metadata.version("jaxlib")
    if not version.startswith(_TESTED_JAXLIB):
        if deterministic and not is_deterministic():
            raise ConfigError(
                f"train.deterministic=True needs a flag that was not tested with jaxlib {version}; "
                "set XLA_FLAGS=--xla_gpu_deterministic_ops=true yourself."
            )
        return f"none (jaxlib {version} was not tested)"
    wanted = _GPU | (_GPU_DETERMINISTIC if deterministic else {})
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*added, os.environ.get("XLA_FLAGS", "")]).strip()
    return " ".join(added) or "none"


def is_deterministic() -> bool:
    """Returns whether `XLA_FLAGS` asks for programs that give the same bits in every run."""
    return _given().get("xla_gpu_deterministic_ops") in ("true", "True", "1", "")


def _given() -> dict[str, str]:
    words = os.environ.get("XLA_FLAGS", "").split()
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {name: value for name, _, value in pairs}  # As in XLA, the last of equal names wins.
