"""The type that `compute_dtype="auto"` stands for on each device."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.model.on_device import compute_dtype, settle
from mobilellm_jax.startup import cpu

ZEN4 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni\nbugs\t\t: none\n"
SKYLAKE = "processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: avx512_bf16\n"


def device(platform: str, capability: str | None = None) -> jax.Device:
    found = mock.Mock(spec=jax.Device)
    found.platform = platform
    if capability is not None:
        found.compute_capability = capability
    return found


@pytest.fixture
def cpu_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str | None], None]]:
    """Makes this machine's CPU say of itself what the test wants."""

    def say(text: str | None) -> None:
        file = tmp_path / "cpuinfo"
        monkeypatch.setattr(cpu, "INFORMATION", file)
        if text is not None:
            file.write_text(text)

    cpu.cpu_features.cache_clear()
    yield say
    cpu.cpu_features.cache_clear()


def resolved(on: jax.Device, **fields: Any) -> str:
    return settle(Config(model=ModelConfig(attention="xla", **fields)), on).model.compute_dtype


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "gfx942", "bfloat16"),
        ("gpu", "gfx1030", "float32"),
    ],
)
def test_accelerators(platform: str, capability: str | None, expected: str) -> None:
    there = device(platform, capability)
    assert resolved(there) == expected
    assert resolved(there, compute_dtype="float32") == "float32"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        (ZEN4, 576, "bfloat16"),
        (ZEN4, 448, "float32"),  # a narrow model gains nothing from bfloat16
        (SKYLAKE, 576, "float32"),
        (None, 576, "float32"),  # not Linux
    ],
)
def test_cpus(
    text: str | None, width: int, expected: str, cpu_info: Callable[[str | None], None]
) -> None:
    cpu_info(text)
    assert (
        resolved(device("cpu"), embed_dim=width, num_heads=width // 64, num_kv_heads=1) == expected
    )


def test_what_is_not_trained_is_float32_on_a_cpu(cpu_info: Callable[[str | None], None]) -> None:
    cpu_info(ZEN4)
    assert compute_dtype(ModelConfig()) == "float32"
    assert compute_dtype(ModelConfig(compute_dtype="bfloat16")) == "bfloat16"
