import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from mobilellm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, changed
from mobilellm_jax.plan import fit
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep, TooLarge
from mobilellm_jax.plan.fit import candidates, smallest_fit, written
from mobilellm_jax.plan.hlo import Program

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64,
        embed_dim=16,
        num_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=32,
        max_seq_len=256,
        compute_dtype="float32",
        attention="xla",
    ),
    data=DataConfig(seq_len=256),
    train=TrainConfig(global_batch=32, loss_chunk=16),
)


DEVICES = tuple(jax.devices()[:2])
count = functools.cache(account_of)  # the tests of this file count the same configs


def needed(config: Config) -> int:
    return count(config, DEVICES).total_bytes


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Config]]:
    """Sets the memory of a device, and returns the configs that the search compiles.

    The stand-in for the compiler needs the counted bytes.
    """
    monkeypatch.setattr(fit, "account_of", count)

    def give(available: int) -> list[Config]:
        asked: list[Config] = []

        def compile_step(config: Config, *_: Any) -> CompiledStep | TooLarge:
            asked.append(config)
            if needed(config) > available:
                return TooLarge(needed(config), available, 0.0)
            return CompiledStep(0, 0, needed(config), Program((), None, {}, 0), 0.0)

        monkeypatch.setattr(fit, "compile_step", compile_step)
        return asked

    return give


def smallest(config: Config, available: int) -> str | None:
    found = smallest_fit(config, DEVICES, TooLarge(needed(config), available, 0.0))
    return found and written(found.change)


def test_order_of_changes() -> None:
    found = list(candidates(changed(CONFIG, {"model.remat": "dots"}), 4))
    on_this_mesh = [
        {"model.remat": "attention"},
        {"model.remat": "full"},
        *({"train.accumulation_steps": n} for n in (2, 4, 8, 16, 32)),
        *({"model.remat": "full", "train.accumulation_steps": n} for n in (2, 4, 8, 16, 32)),
    ]
    assert found[: len(on_this_mesh)] == on_this_mesh
    rest = found[len(on_this_mesh) :]
    assert rest[: len(on_this_mesh) + 1] == [
        {"mesh.fsdp": 2},
        *({"mesh.fsdp": 2} | change for change in on_this_mesh),
    ]
    assert {change["mesh.fsdp"] for change in rest} == {2, 4}
    # If mesh.data is a number, the change has to replace it.
    fixed = list(candidates(dataclasses.replace(CONFIG, mesh=MeshConfig(data=4)), 4))
    assert {"mesh.fsdp": 2, "mesh.data": -1} in fixed
    # Everything is recomputed already, and mesh.fsdp takes all devices already.
    given = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=-1))
    last = changed(given, {"model.remat": "full", "train.accumulation_steps": 32})
    assert list(candidates(last, 4)) == []


def test_the_first_that_fits_is_named_and_nothing_hopeless_compiled(compiles: Any) -> None:
    sizes = {r: needed(changed(CONFIG, {"model.remat": r})) for r in ("none", "dots", "attention")}
    assert sizes["none"] > 1.2 * sizes["dots"] > 1.2 * sizes["attention"]
    asked = compiles(sizes["attention"])
    assert smallest(CONFIG, sizes["attention"]) == "--config.model.remat=attention"
    assert [c.model.remat for c in asked] == ["attention"]


def test_the_error_of_the_count_is_added_to_every_change(compiles: Any) -> None:
    """The compiler needed more than the count, so a change that just fits by count is not tried."""
    dots = needed(changed(CONFIG, {"model.remat": "dots"}))
    asked = compiles(dots)
    failed = TooLarge(needed(CONFIG) + dots, dots, 0.0)
    smallest_fit(CONFIG, DEVICES, failed)
    assert "dots" not in [c.model.remat for c in asked]


def test_accumulation_is_tried_if_everything_is_recomputed(
    compiles: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    full = changed(CONFIG, {"model.remat": "full"})
    available = (needed(full) + needed(changed(full, {"train.accumulation_steps": 2}))) // 2
    compiles(available)
    found = smallest(full, available)
    assert found == "--config.train.accumulation_steps=2"
    assert caplog.messages == [f"compiling with {found} ..."]


def test_fsdp_is_tried_if_the_state_alone_is_too_large(compiles: Any) -> None:
    width = {"model.embed_dim": 64, "model.ffn_dim": 256}
    tokens = {"data.seq_len": 32, "train.global_batch": 8}
    large = changed(CONFIG, {**width, **tokens, "model.remat": "full"})
    account = account_of(large, DEVICES)
    available = account.weight_bytes + account.optimizer_bytes
    assert available < account.total_bytes < 2 * available
    asked = compiles(available)
    assert smallest(large, available) == "--config.mesh.fsdp=2"
    assert len(asked) == 1


def test_nothing_fits(compiles: Any) -> None:
    asked = compiles(1000)
    assert smallest(CONFIG, 1000) is None
    assert asked == []
