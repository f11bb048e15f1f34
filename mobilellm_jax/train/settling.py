"""Settles what a training step needs from a config and from devices, present or described."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.model.on_device import device_violations, resolve_attention
from mobilellm_jax.model.precision import resolve_compute_dtype
from mobilellm_jax.sharding import Rules, batch_violations, logical_rules, make_mesh


def settle(config: Config, device: jax.Device) -> Config:
    """Replaces every `auto` by its value on the device."""
    model = resolve_compute_dtype(config.model, device)
    return resolve_attention(dataclasses.replace(config, model=model), device)


def mesh_violations(config: Config, mesh: Mesh) -> list[str]:
    """Returns the rules that the config breaks on this mesh, a message each."""
    return batch_violations(config, mesh) + device_violations(config, mesh.devices.flat[0])


def mesh_of(config: Config, devices: Sequence[jax.Device]) -> tuple[Mesh, Rules]:
    """Returns the mesh over the devices and its sharding rules.

    Raises:
      ConfigError: if the config does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    if violations := mesh_violations(config, mesh):
        raise ConfigError("\n".join(violations))
    return mesh, logical_rules(config.model, mesh.shape)
