"""The number type of activations and matrix products; parameters are always float32."""

import dataclasses

import jax
import jax.numpy as jnp

from mobilellm_jax.config import ComputeDtype, ModelConfig
from mobilellm_jax.startup.cpu import cpu_features

_CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
# A step of a narrower model mostly passes over activations, and bfloat16 does not speed that up.
_CPU_LEAST_WIDTH = 512


def resolve_compute_dtype(config: ModelConfig, device: jax.Device | None = None) -> ModelConfig:
    """Replaces `compute_dtype="auto"` by the type that trains fastest on the (default) device.

    The type is bfloat16 on TPUs, on GPUs with bfloat16 matrix units (NVIDIA from 8.0, AMD from
    MI200), and on CPUs with bfloat16 instructions if the model has a width of at least 512. It is
    float32 elsewhere.
    """
    if config.compute_dtype != "auto":
        return config
    device = jax.devices()[0] if device is None else device
    narrow = _multiplies_bfloat16(device) or (
        device.platform == "cpu"
        and config.embed_dim >= _CPU_LEAST_WIDTH
        and cpu_multiplies_bfloat16()
    )
    return dataclasses.replace(config, compute_dtype=_NAMES[narrow])


def compute_dtype(config: ModelConfig) -> jax.typing.DTypeLike:
    """Returns the JAX type of activations.

    An "auto" that training did not resolve means bfloat16 on TPUs and on GPUs with bfloat16 matrix
    units. On CPUs it means float32, because users compare scores on CPUs with other programs.
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(_NAMES[_multiplies_bfloat16(jax.devices()[0])])


def cpu_multiplies_bfloat16() -> bool:
    """Returns whether the CPU of this machine has instructions for bfloat16 products."""
    return bool(_CPU_BFLOAT16 & cpu_features())


_NAMES: dict[bool, ComputeDtype] = {False: "float32", True: "bfloat16"}


def _multiplies_bfloat16(device: jax.Device) -> bool:
    if device.platform != "gpu":
        return bool(device.platform == "tpu")
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx942" of an MI300
    if capability.startswith("gfx"):
        return capability.startswith(("gfx90a", "gfx94", "gfx95"))
    return float(capability or 0) >= 8.0
