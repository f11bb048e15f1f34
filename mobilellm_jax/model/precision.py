"""Which number type activations and matrix products use; parameters are float32 throughout."""

import dataclasses

import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig


def resolve_compute_dtype(config: ModelConfig, device: jax.Device | None = None) -> ModelConfig:
    """Replaces `compute_dtype="auto"` by the type that is fastest on the device (the default one).

    That is bfloat16 on TPUs and on GPUs from compute capability 8.0 on, which have matrix units
    for it, and float32 elsewhere: XLA's CPU backend converts bfloat16 operands before most
    products and loses more than it gains.
    """
    if config.compute_dtype != "auto":
        return config
    device = jax.devices()[0] if device is None else device
    capability = float(getattr(device, "compute_capability", 0) or 0)
    fast = device.platform == "tpu" or (device.platform == "gpu" and capability >= 8.0)
    return dataclasses.replace(config, compute_dtype="bfloat16" if fast else "float32")


def compute_dtype(config: ModelConfig) -> jax.typing.DTypeLike:
    """Returns the JAX type of activations, resolving "auto" for the default device."""
    name = resolve_compute_dtype(config).compute_dtype
    return jnp.dtype(name)
