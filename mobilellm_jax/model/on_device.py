"""Replaces the `auto` of a config by a device's best choice, and checks a config against a device.

`model.compute_dtype=auto` is the type that trains fastest: bfloat16 on TPUs, on GPUs with bfloat16
matrix units (NVIDIA from 8.0, AMD from MI200), and on CPUs with bfloat16 instructions if the model
has a width of at least 512. It is float32 elsewhere. Parameters are always float32.

`model.attention=auto` selects the first kernel in this table that the device can run and that
supports the config. The choice depends on no measurement, so a config gives the same program on all
devices of a kind:

| device     | first choice | second choice                              | else  |
|------------|--------------|--------------------------------------------|-------|
| TPU        | `splash`     |                                            | `xla` |
| NVIDIA GPU | `cudnn`      | `tokamax` (if installed; takes documents)  | `xla` |
| other      |              |                                            | `xla` |
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp

from mobilellm_jax.config import Attention, ComputeDtype, Config, ModelConfig
from mobilellm_jax.config.rules import ATTENTION, attention_violations
from mobilellm_jax.startup.cpu import cpu_features

INSTALL_TOKAMAX = 'pip install "mobilellm-jax[tokamax]"'

_CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # CPU flags of bfloat16 instructions.
# A narrower model spends most of a step on reading and writing activations, which bfloat16 does not
# speed up.
_CPU_LEAST_WIDTH = 512
_CHOICES: dict[str, tuple[Attention, ...]] = {"tpu": ("splash",), "gpu": ("cudnn", "tokamax")}
_AMPERE, _HOPPER = 8.0, 9.0  # Compute capabilities of NVIDIA GPUs.
_CUDNN_HEAD_DIM = {_AMPERE: 128, _HOPPER: 256}
_WITH_A_HOST = ("gpu", "tpu")  # On CPUs, JAX silently ignores transfers to the host.


def settle(config: Config, device: jax.Device) -> Config:
    """Replaces every `auto` by its value on the device."""
    model = config.model
    if model.compute_dtype == "auto":
        wide_on_cpu = device.platform == "cpu" and model.embed_dim >= _CPU_LEAST_WIDTH
        narrow = _multiplies_bfloat16(device) or (
            wide_on_cpu and bool(_CPU_BFLOAT16 & cpu_features())
        )
        model = dataclasses.replace(model, compute_dtype=_name(narrow))
        config = dataclasses.replace(config, model=model)
    if model.attention == "auto":
        able = [
            name
            for name in _CHOICES.get(device.platform, ())
            if not list(attention_violations(config, name))
            and not _attention_violation(name, model, device)
        ]
        model = dataclasses.replace(model, attention=able[0] if able else "xla")
    return dataclasses.replace(config, model=model)


def compute_dtype(config: ModelConfig) -> jax.typing.DTypeLike:
    """Returns the JAX type of activations.

    If the config still has "auto", the type is bfloat16 on TPUs and on GPUs with bfloat16 matrix
    units. On CPUs the type is float32, because users compare scores from CPUs with scores of other
    programs.
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(_name(_multiplies_bfloat16(jax.devices()[0])))


def device_violations(config: Config, device: jax.Device) -> list[str]:
    """Returns one message for each setting that the device does not support."""
    violation = _attention_violation(config.model.attention, config.model, device)
    violations = [violation] if violation else []
    if config.model.remat == "offload" and device.platform not in _WITH_A_HOST:
        violations.append(
            "model.remat='offload' moves block inputs from the device's memory to the host's, and "
            f"{device.device_kind} has no memory of its own; choose --config.model.remat=full."
        )
    return violations


def _name(bfloat16: bool) -> ComputeDtype:
    return "bfloat16" if bfloat16 else "float32"


def _multiplies_bfloat16(device: jax.Device) -> bool:
    if device.platform != "gpu":
        return bool(device.platform == "tpu")
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx942" of an MI300
    if capability.startswith("gfx"):
        return capability.startswith(("gfx90a", "gfx94", "gfx95"))
    return float(capability or 0) >= _AMPERE


def _attention_violation(name: str, model: ModelConfig, device: jax.Device) -> str | None:
    """Returns why the device cannot run the attention kernel `name`, or None if it can."""
    rules, field = ATTENTION.get(name), f"model.attention={name!r}"
    if rules is None or not rules.device:
        return None
    if device.platform != rules.device:
        return (
            f"{field} runs on {rules.device.upper()}s, and this is {device.device_kind}; choose "
            "auto or xla."
        )
    if rules.device != "gpu":
        return None
    # NVIDIA's compute capability is a number. AMD's is a name such as gfx90a.
    nvidia = device.device_kind.startswith("NVIDIA")
    capability = float(device.compute_capability) if nvidia else 0.0
    needed = _HOPPER if name == "tokamax" else _AMPERE
    if capability < needed:
        return (
            f"{field} needs an NVIDIA GPU of compute capability {needed} or more, and this is "
            f"{device.device_kind}; choose auto or xla."
        )
    most = max(dim for since, dim in _CUDNN_HEAD_DIM.items() if capability >= since)
    if name == "cudnn" and model.head_dim > most:
        return (
            f"model.head_dim={model.head_dim} must be at most {most} for {field} on "
            f"{device.device_kind}; choose auto or xla."
        )
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return (
            f"{field} needs Tokamax, which is not installed: {INSTALL_TOKAMAX}; or choose auto "
            "or xla."
        )
    return None
