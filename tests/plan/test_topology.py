import importlib.util

import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.plan.topology import parse_topology, topology_devices
from mobilellm_jax.train.metrics import peak_flops

WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra tpu"
)


@pytest.mark.parametrize(
    ("name", "sides", "slices", "devices"),
    [
        ("v5e:16x16", (16, 16), 1, 256),
        ("v5p:4x4x4", (4, 4, 4), 1, 64),
        ("v4:2x2x1", (2, 2, 1), 1, 4),
        ("v6e:2x4", (2, 4), 1, 8),
        ("v5e:1x1", (1, 1), 1, 1),
        ("2xv5e:16x16", (16, 16), 2, 512),
    ],
)
def test_names(name: str, sides: tuple[int, ...], slices: int, devices: int) -> None:
    found = parse_topology(name)
    assert (found.sides, found.slices, found.num_devices) == (sides, slices, devices)
    assert found.chip.name in name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("v5e", "--topology=v5e must look like v5e:16x16"),
        ("v5e:16*16", "must look like"),
        ("v5e:0x2", "must look like"),
        ("v5e:16x16x", "must look like"),
        ("v7:4x4", "an unknown kind of TPU; choose v4, v5e, v5p, v6e."),
        ("v5e:4x4x4", "a slice of v5e has 2 sides, as v5e:4x4."),
        ("v5p:4x4", "a slice of v5p has 3 sides, as v5p:4x4x4."),
        ("v5e:32x32", "at most 256 chips; join several, as 2xv5e:32x32."),
        ("v5e:3x4", "the first two sides must be even"),
        ("v6e:1x8", "the first two sides must be even"),
    ],
)
def test_impossible_slices_are_refused(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule.replace("*", r"\*")):
        parse_topology(name)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "mobilellm-jax\[tpu\]"'):
        topology_devices(parse_topology("v5e:2x2"))


@WITH_LIBTPU
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:16x16", "v5p:4x4x4", "2xv6e:4x4"])
def test_devices_of_an_absent_slice(name: str) -> None:
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.num_devices
    assert {device.platform for device in devices} == {"tpu"}
    assert peak_flops(devices[0]) is not None
    slices = {getattr(device, "slice_index", None) for device in devices}
    assert len(slices) == topology.slices
