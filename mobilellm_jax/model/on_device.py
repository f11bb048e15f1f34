"""Checks a config against a device, and chooses the attention that `auto` stands for.

`model.attention=auto` takes the first kernel in this table that the device has and that supports
the config. The choice does not depend on a measurement, so a config is the same program on every
device of a kind:

| device     | first choice | second choice                              | else  |
|------------|--------------|--------------------------------------------|-------|
| TPU        | `splash`     |                                            | `xla` |
| NVIDIA GPU | `cudnn`      | `tokamax` (if installed; takes documents)  | `xla` |
| other      |              |                                            | `xla` |
"""

import dataclasses
import importlib.util
from collections.abc import Iterator

import jax

from mobilellm_jax.config import ATTENTION, Attention, Config, ModelConfig, attention_violations

INSTALL_TOKAMAX = 'pip install "mobilellm-jax[tokamax]"'

_CHOICES: dict[str, tuple[Attention, ...]] = {"tpu": ("splash",), "gpu": ("cudnn", "tokamax")}
_AMPERE, _HOPPER = 8.0, 9.0  # compute capabilities
_CUDNN_HEAD_DIM = {_AMPERE: 128, _HOPPER: 256}
_WITH_A_HOST = ("gpu", "tpu")  # on CPUs, JAX ignores the transfers silently


def resolve_attention(config: Config, device: jax.Device) -> Config:
    """Replaces `model.attention="auto"`; the caller resolves `compute_dtype` first."""
    if config.model.attention != "auto":
        return config
    assert config.model.compute_dtype != "auto", (
        "the choice of a kernel depends on the compute dtype"
    )
    able = [
        name
        for name in _CHOICES.get(device.platform, ())
        if not list(attention_violations(config, name))
        and not list(_attention_on(name, config.model, device))
    ]
    model = dataclasses.replace(config.model, attention=able[0] if able else "xla")
    return dataclasses.replace(config, model=model)


def device_violations(config: Config, device: jax.Device) -> list[str]:
    """Returns one message for each setting that the device does not support."""
    violations = list(_attention_on(config.model.attention, config.model, device))
    if config.model.remat == "offload" and device.platform not in _WITH_A_HOST:
        violations.append(
            "model.remat='offload' moves block inputs from the device's memory to the host's, and "
            f"{device.device_kind} has no memory of its own; choose --config.model.remat=full."
        )
    return violations


def _attention_on(name: str, model: ModelConfig, device: jax.Device) -> Iterator[str]:
    rules = ATTENTION.get(name)
    if rules is None or not rules.device:
        return
    field = f"model.attention={name!r}"
    if device.platform != rules.device:
        yield (
            f"{field} runs on {rules.device.upper()}s, and this is {device.device_kind}; choose "
            "auto or xla."
        )
        return
    if rules.device == "gpu":
        yield from _attention_on_gpu(name, model, device)


def _attention_on_gpu(name: str, model: ModelConfig, device: jax.Device) -> Iterator[str]:
    field = f"model.attention={name!r}"
    # NVIDIA's compute capability is a number. AMD's is a name such as gfx90a.
    nvidia = device.device_kind.startswith("NVIDIA")
    capability = float(device.compute_capability) if nvidia else 0.0
    needed = _HOPPER if name == "tokamax" else _AMPERE
    if capability < needed:
        yield (
            f"{field} needs an NVIDIA GPU of compute capability {needed} or more, and this is "
            f"{device.device_kind}; choose auto or xla."
        )
        return
    most = max(dim for since, dim in _CUDNN_HEAD_DIM.items() if capability >= since)
    if name == "cudnn" and model.head_dim > most:
        yield (
            f"model.head_dim={model.head_dim} must be at most {most} for {field} on "
            f"{device.device_kind}; choose auto or xla."
        )
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        yield (
            f"{field} needs Tokamax, which is not installed: {INSTALL_TOKAMAX}; or choose auto "
            "or xla."
        )
