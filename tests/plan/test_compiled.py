import dataclasses
import importlib.util
from typing import Any

import jax
import pytest

from mobilellm_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.plan.compiled import (
    CompiledStep,
    TooLarge,
    compile_step,
    lower_step,
    needed_and_available,
)
from mobilellm_jax.plan.topology import parse_topology, topology_devices
from mobilellm_jax.train.spikes import WINDOW_STEPS
from mobilellm_jax.train.state import mesh_of

CONFIG = Config(
    model=ModelConfig(
        vocab_size=128,
        embed_dim=32,
        num_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=48,
        max_seq_len=128,
    ),
    data=DataConfig(seq_len=128),
    train=TrainConfig(global_batch=8),
)


def test_auto_is_settled_for_the_device() -> None:
    settled = settle(CONFIG, jax.devices()[0])
    assert (settled.model.compute_dtype, settled.model.attention) == ("float32", "xla")


def test_a_step_of_this_machine() -> None:
    config = settle(CONFIG, jax.devices()[0])
    step = compile_step(config, jax.devices())
    assert isinstance(step, CompiledStep)
    parameters = 128 * 32 + 2 * (32 * 16 * 4 + 32 * 32 + 3 * 32 * 48 + 64) + 32
    batch = 3 * 128 * 4  # a row of tokens, targets and weights
    recent = 2 * 4 * WINDOW_STEPS  # recent values of the guard against spikes
    counters = step.state_bytes - 12 * parameters - batch - recent
    assert 0 < counters < 64
    assert step.temporary_bytes > 0
    assert step.peak_bytes > step.state_bytes
    assert {c.kind for c in step.program.collectives} == {"all-reduce"}


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_documents_are_inputs_of_the_step_that_masks_them(boundaries: Any) -> None:
    config = settle(
        dataclasses.replace(CONFIG, data=DataConfig(seq_len=128, boundaries=boundaries)),
        jax.devices()[0],
    )
    lowered = lower_step(config, jax.devices())
    names = set(lowered.args_info[0][1])
    documents = {"segments", "positions"} if boundaries == "document_mask" else set()
    assert names == {"tokens", "targets", "weights"} | documents


def test_a_config_that_the_mesh_cannot_run_is_refused() -> None:
    def refused(**groups: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            mesh_of(dataclasses.replace(CONFIG, **groups), jax.devices())
        return str(caught.value)

    assert "train.global_batch=12 must be a multiple" in refused(train=TrainConfig(global_batch=12))
    assert "must use all 8 devices" in refused(mesh=MeshConfig(data=3))
    wide = MeshConfig(data=1, fsdp=-1)
    narrow = dataclasses.replace(CONFIG.model, embed_dim=36)
    assert "model.embed_dim=36 must be a multiple" in refused(mesh=wide, model=narrow)
    kernel = dataclasses.replace(CONFIG.model, attention="splash")
    assert "runs on TPUs" in refused(model=kernel)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (73.22G) exceeds available HBM (15.75G).",
            (round(73.22 * 2**30), round(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.50M of 15.75G "
            "hbm. Exceeded hbm capacity by ...",
            (round(512.5 * 2**20), round(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: too many streams", None),
        ("INTERNAL: (1G) exceeds available HBM (2G)", None),
    ],
)
def test_sizes_in_the_compilers_message(message: str, sizes: tuple[int, int] | None) -> None:
    assert needed_and_available(message) == sizes


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: (3G) exceeds available HBM (2G)", "bug"])
def test_a_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    config = settle(CONFIG, jax.devices()[0])
    if message == "bug":
        with pytest.raises(jax.errors.JaxRuntimeError, match="bug"):
            compile_step(config, jax.devices())
        return
    failed = compile_step(config, jax.devices())
    assert isinstance(failed, TooLarge)
    assert (failed.needed_bytes, failed.available_bytes) == (3 * 2**30, 2 * 2**30)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra tpu"
)
@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_a_step_for_tpus(boundaries: Any) -> None:
    """The step has its kernels, and pure data parallelism sends only gradients."""
    devices = topology_devices(parse_topology("v5e:2x2"))
    data = DataConfig(seq_len=128, boundaries=boundaries)
    model = dataclasses.replace(CONFIG.model, remat="dots")
    config = settle(dataclasses.replace(CONFIG, data=data, model=model), devices[0])
    assert (config.model.compute_dtype, config.model.attention) == ("bfloat16", "splash")
    step = compile_step(config, devices)
    assert isinstance(step, CompiledStep)
    assert {c.kind for c in step.program.collectives} == {"all-reduce"}
    # Each of two blocks calls one kernel forward and two kernels backward.
    assert sorted(step.program.kernels.values()) == [2, 2, 2]
    assert step.program.estimated_cycles is not None and step.program.unknown_loops == 0
