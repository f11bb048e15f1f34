"""Reads names of TPU slices, and returns their devices for the compiler; needs no TPU.

`v5e:16x16` is a slice of 16 x 16 chips. `2xv5e:16x16` means two such slices, which the data center
network (DCN) connects.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from mobilellm_jax.config import ConfigError

INSTALL_LIBTPU = 'pip install "mobilellm-jax[tpu]"'

_GIB = 2**30
# These variables keep libtpu from contacting a metadata server and from locking a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Any valid type keeps libtpu from searching for a host.
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    The values are from Cloud TPU's documentation, July 2026; the memory is from libtpu.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_sec: float
    ici_bytes_per_sec: float  # Rate of all links: half of the documented "bidirectional" rate.
    flops_per_cycle: int  # FLOPs in bfloat16 of all matrix units together.
    matrix_unit: int  # Number of rows, and of columns, of a matrix unit.
    dimensions: int  # Number of dimensions of a slice.
    most_chips: int  # Number of chips in the largest slice.
    variant: str | None = None  # Name in libtpu of the mode in which each chip is one device.


_CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * _GIB), 1228e9, 300e9, 8 * 128**2 * 2, 128, 3, 4096, "megacore"),
        Chip("v5e", int(15.75 * _GIB), 819e9, 200e9, 4 * 128**2 * 2, 128, 2, 256),
        Chip("v5p", int(95.74 * _GIB), 2765e9, 600e9, 8 * 128**2 * 2, 128, 3, 8960),
        Chip("v6e", int(31.25 * _GIB), 1640e9, 400e9, 4 * 256**2 * 2, 256, 2, 256),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices with the same shape and the same kind of chip."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    slices: int

    @property
    def num_devices(self) -> int:
        """The number of devices in all slices; each chip is one device."""
        return math.prod(self.sides) * self.slices


def parse_topology(name: str) -> Topology:
    """Reads a name such as `v5p:4x4x4` or `2xv5e:16x16`; raises a `ConfigError` otherwise."""
    field = f"--topology={name}"
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(v\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if found is None:
        raise ConfigError(f"{field} must look like v5e:16x16, v5p:4x4x4 or 2xv5e:16x16.")
    slices, kind, written = found.groups()
    chip = _CHIPS.get(kind)
    if chip is None:
        raise ConfigError(f"{field} names an unknown kind of TPU; choose {', '.join(_CHIPS)}.")
    sides = tuple(map(int, written.split("x")))
    if len(sides) != chip.dimensions:
        example = {2: f"{kind}:4x4", 3: f"{kind}:4x4x4"}[chip.dimensions]
        raise ConfigError(f"{field}: a slice of {kind} has {chip.dimensions} sides, as {example}.")
    chips = math.prod(sides)
    if chips > chip.most_chips:
        raise ConfigError(
            f"{field}: a slice of {kind} has at most {chip.most_chips} chips; join several, as "
            f"2x{kind}:{written}."
        )
    if chips > 1 and any(side % 2 for side in sides[:2]):
        raise ConfigError(
            f"{field}: hosts have 2 x 2 chips, so the first two sides must be even (or all 1)."
        )
    return Topology(name, chip, sides, int(slices or 1))


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns devices for which programs can be compiled but not run.

    Raises:
      ConfigError: if libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology.name} needs libtpu, the TPU compiler, which runs on any Linux "
            f"machine: {INSTALL_LIBTPU}"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, object] = {}
    if math.prod(topology.sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.variant:
        options["chip_config_name"] = topology.chip.variant
    shape = "x".join(map(str, topology.sides))
    try:
        found = topologies.get_topology_desc(
            topology_name=f"{topology.chip.name}:{shape}", platform="tpu", **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology={topology.name}: libtpu refuses this slice: {error}"
        ) from error
    return list(found.devices)
