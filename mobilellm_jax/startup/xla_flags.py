"""Flags for XLA's compilers: the one place where this package sets any.

XLA reads `XLA_FLAGS` once, when the first backend starts, and ends the process for a flag that it
does not know. So `set_xla_flags` runs first of all, sets only what stands below, and only with a
jaxlib that it was tried with. What the user wrote in `XLA_FLAGS` wins.

| device | flag | why |
|---|---|---|
| GPU | `xla_gpu_enable_latency_hiding_scheduler=true` | moves collectives behind products; the one
  flag that NVIDIA bakes into its JAX images; nothing to do on a single GPU |
| GPU | `xla_gpu_deterministic_ops=true` | under `train.deterministic`: no atomics, cuDNN's
  deterministic attention, no choice of products by timing them |

None for TPU (`LIBTPU_INIT_ARGS`): no gain was measured. None for CPU. Neither needs one to be
deterministic.
"""

import importlib.util
import os
from importlib import metadata

from mobilellm_jax.config import ConfigError

_GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
_GPU_DETERMINISTIC = {"xla_gpu_deterministic_ops": "true"}
_TRIED_JAXLIB = ("0.10.", "0.11.")  # tests/test_xla_flags.py runs them with the one installed
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def set_xla_flags(*, deterministic: bool) -> str:
    """Adds to `XLA_FLAGS` what this machine's accelerator profits from; returns what was added.

    Call it before anything starts a backend.

    Raises:
      ConfigError: if the user's `XLA_FLAGS` contradict `train.deterministic`, or determinism
        is asked of a jaxlib that was not tried.
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
    if not version.startswith(_TRIED_JAXLIB):
        if deterministic and not is_deterministic():
            raise ConfigError(
                f"train.deterministic=True takes a flag that was not tried with jaxlib {version}; "
                "set XLA_FLAGS=--xla_gpu_deterministic_ops=true yourself."
            )
        return f"none (jaxlib {version} was not tried)"
    wanted = _GPU | (_GPU_DETERMINISTIC if deterministic else {})
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*added, os.environ.get("XLA_FLAGS", "")]).strip()
    return " ".join(added) or "none"


def is_deterministic() -> bool:
    """Returns whether XLA was told to compile for GPUs only what computes the same bits twice."""
    return _given().get("xla_gpu_deterministic_ops") in ("true", "True", "1", "")


def _given() -> dict[str, str]:
    words = os.environ.get("XLA_FLAGS", "").split()
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {name: value for name, _, value in pairs}  # of one given twice the last, as in XLA
