import dataclasses
import importlib.util
from typing import Any
from unittest import mock

import jax
import pytest

from mobilellm_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from mobilellm_jax.model.on_device import device_violations, settle

CPU = ("cpu", "cpu", None)
TPU = ("tpu", "TPU v5 lite", None)
A100 = ("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
V100 = ("gpu", "NVIDIA V100", "7.0")
H100 = ("gpu", "NVIDIA H100 80GB HBM3", "9.0")
MI300 = ("gpu", "AMD Instinct MI300X", "gfx942")


def device(platform: str, kind: str, capability: str | None) -> jax.Device:
    """Returns a fake device."""
    found = mock.Mock(spec=jax.Device)
    found.platform, found.device_kind, found.compute_capability = platform, kind, capability
    return found


def config(**model: Any) -> Config:
    return Config(model=ModelConfig(**{"compute_dtype": "bfloat16", **model}))


@pytest.fixture
def tokamax(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes Tokamax look installed or absent."""

    def install(there: bool) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: there or None)

    return install


@pytest.mark.parametrize(
    ("where", "concat", "documents", "documents_with_tokamax"),
    [
        (CPU, "xla", "xla", "xla"),
        (TPU, "splash", "splash", "splash"),
        (V100, "xla", "xla", "xla"),
        (A100, "cudnn", "xla", "xla"),
        (H100, "cudnn", "xla", "tokamax"),
        (MI300, "xla", "xla", "xla"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_auto_follows_the_table(
    tokamax: Any, where: Any, concat: str, documents: str, documents_with_tokamax: str
) -> None:
    masked = dataclasses.replace(config(), data=DataConfig(boundaries="document_mask"))
    tokamax(False)
    assert settle(config(), device(*where)).model.attention == concat
    assert settle(masked, device(*where)).model.attention == documents
    tokamax(True)
    assert settle(config(), device(*where)).model.attention == concat
    found = settle(masked, device(*where))
    assert found.model.attention == documents_with_tokamax
    assert device_violations(found, device(*where)) == []


def test_auto_never_picks_what_the_config_forbids() -> None:
    def chosen(of: Config, where: Any) -> str:
        return settle(of, device(*where)).model.attention

    assert chosen(config(compute_dtype="float32"), H100) == "xla"
    assert chosen(config(head_dim=20), H100) == "xla"
    assert chosen(config(head_dim=256), H100) == "cudnn"
    assert chosen(config(head_dim=256), A100) == "xla"
    split = dataclasses.replace(config(), mesh=MeshConfig(data=1, sequence=-1))
    odd = dataclasses.replace(config(), data=DataConfig(seq_len=1000))
    for where in (TPU, H100):
        assert chosen(split, where) == "xla"
    assert chosen(odd, TPU) == "xla"


def test_a_choice_is_kept() -> None:
    for name in ("xla", "cudnn"):
        assert settle(config(attention=name), device(*TPU)) == config(attention=name)


@pytest.mark.parametrize(
    ("name", "where", "rule"),
    [
        ("splash", CPU, "model.attention='splash' runs on TPUs, and this is cpu; choose auto or"),
        ("cudnn", TPU, "model.attention='cudnn' runs on GPUs, and this is TPU v5 lite;"),
        ("cudnn", V100, "compute capability 8.0 or more, and this is NVIDIA V100;"),
        ("cudnn", MI300, "needs an NVIDIA GPU of compute capability 8.0"),
        ("tokamax", A100, "compute capability 9.0 or more, and this is NVIDIA A100"),
        ("tokamax", H100, 'not installed: pip install "mobilellm-jax[tokamax]"'),
    ],
)
def test_a_setting_that_the_device_does_not_support_is_refused(
    tokamax: Any, name: str, where: Any, rule: str
) -> None:
    tokamax(False)
    (found,) = device_violations(config(attention=name), device(*where))
    assert rule in found


def test_wide_heads_need_a_newer_gpu() -> None:
    (found,) = device_violations(config(attention="cudnn", head_dim=256), device(*A100))
    assert "model.head_dim=256 must be at most 128" in found
    assert device_violations(config(attention="cudnn", head_dim=256), device(*H100)) == []


def test_offload_needs_a_device_with_a_host() -> None:
    offloaded = config(attention="xla", remat="offload")
    for where in (TPU, H100):
        assert device_violations(offloaded, device(*where)) == []
    (found,) = device_violations(offloaded, device(*CPU))
    assert "model.remat='offload'" in found and "--config.model.remat=full" in found
    assert device_violations(config(remat="full"), device(*CPU)) == []


def test_this_machine_runs_the_attention_that_auto_chooses() -> None:
    here = jax.devices()[0]
    found = settle(config(), here)
    assert found.model.attention == "xla"
    assert device_violations(found, here) == []
