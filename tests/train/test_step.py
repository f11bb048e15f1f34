import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import StepMetrics, chunk_positions

HUGE = 1e25  # the square overflows float32


def train(run: Any, batches: list[dict[str, np.ndarray]]) -> tuple[TrainState, list[StepMetrics]]:
    """Takes one step per batch from the initial state."""
    state, metrics = run.state(), []
    for batch in batches:
        state, values = run.step_fn(state, run.put(batch))
        metrics.append(jax.device_get(values))
    return state, metrics


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def largest_difference(left: Any, right: Any) -> float:
    differences = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), *jax.device_get((left, right))
    )
    return max(jax.tree.leaves(differences))


def test_metrics_are_those_of_the_step(prepare: Callable, make_batch: Callable) -> None:
    run = prepare(1)
    batches = [make_batch(seed) for seed in range(3)]
    state, metrics = train(run, batches)
    assert (int(state.step), int(state.bad_steps)) == (3, 0)
    # The targets are random and the model is new, so all 48 tokens are about equally likely.
    assert metrics[0]["loss"] == pytest.approx(np.log(48), abs=0.05)
    for batch, values in zip(batches, metrics, strict=True):
        assert values["targets"] == batch["weights"].sum()
        assert 64 < values["targets"] < 8 * 16
        assert not values["skipped"]
        assert np.isfinite(values["grad_norm"]) and values["grad_norm"] > 0
    # The rate rises from 0 to the peak in one step, then falls to a tenth in 19 steps.
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi / 19)) / 2
    assert [m["learning_rate"] for m in metrics] == pytest.approx([0, 1e-2, 1e-2 * cosine])
    assert largest_difference(state.params, run.initial.params) > 1e-3


def test_first_update_is_zero(prepare: Callable, make_batch: Callable) -> None:
    run = prepare(1)
    state, _ = train(run, [make_batch(0)])
    assert_same_bits(state.params, run.initial.params)
    assert largest_difference(state.optimizer, run.initial.optimizer) > 0


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_micro_batches_add_up_to_the_batch(
    prepare: Callable, make_batch: Callable, accumulation_steps: int
) -> None:
    whole, parts = prepare(1), prepare(accumulation_steps)
    assert parts.config != whole.config
    batches = [make_batch(seed) for seed in range(3)]
    for batch in batches:
        # Row r is in micro-batch r mod accumulation_steps. The micro-batches have different numbers
        # of targets, and the first has none, so a mean of means differs from the mean.
        batch["weights"][::2] *= np.arange(4)[:, None] == 1
        batch["weights"][0::accumulation_steps] *= 0
    state, metrics = train(whole, batches)
    found_state, found_metrics = train(parts, batches)
    for values, found in zip(metrics, found_metrics, strict=True):
        assert found["targets"] == values["targets"]
        assert found["loss"] == pytest.approx(values["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-5)
    assert largest_difference(state.params, found_state.params) < 1e-6
    assert largest_difference(state.params, whole.initial.params) > 1e-3


def test_targets_without_weight_change_nothing(prepare: Callable, make_batch: Callable) -> None:
    run = prepare(1)
    batches = [make_batch(seed) for seed in range(2)]
    # Targets without weight change. Tokens change only at the end of a row, which no target sees.
    other = [{name: x.copy() for name, x in batch.items()} for batch in batches]
    for batch, changed in zip(batches, other, strict=True):
        ignored = batch["weights"] == 0
        changed["targets"][ignored] = (changed["targets"][ignored] + 1) % 48
        for both in (batch, changed):
            both["weights"][:, -4:] = 0
        changed["tokens"][:, -4:] = 7
        assert not np.array_equal(batch["tokens"], changed["tokens"])
    state, metrics = train(run, batches)
    found_state, found_metrics = train(run, other)
    assert [m["loss"] for m in found_metrics] == [m["loss"] for m in metrics]
    # The changed tokens change the order in which zero gradients are added.
    assert largest_difference(state.params, found_state.params) < 1e-6


def test_a_batch_without_targets_has_no_loss(prepare: Callable, make_batch: Callable) -> None:
    run = prepare(1)
    batch = make_batch(0) | {"weights": np.zeros((8, 16), np.float32)}
    _, (metrics,) = train(run, [batch])
    assert (metrics["loss"], metrics["targets"], metrics["grad_norm"]) == (0, 0, 0)
    assert not metrics["skipped"]


def test_documents_of_a_batch_reach_the_model(prepare: Callable, make_batch: Callable) -> None:
    """Two documents per row give the loss and the gradient of one document per row."""
    run = prepare(1)
    packed = make_batch(0)
    packed["weights"][4:] = 0  # rows 4 to 7 are free
    alone = {name: x.copy() for name, x in packed.items()}
    alone["weights"][:] = 0
    for row, cut in enumerate((3, 8, 10, 15)):
        for name in ("tokens", "targets", "weights"):
            alone[name][row, :cut] = packed[name][row, :cut]
            alone[name][4 + row, : 16 - cut] = packed[name][row, cut:]
    cuts = np.array([3, 8, 10, 15, 16, 16, 16, 16])[:, None]
    place = np.arange(16)[None, :]
    channels = {
        "segments": np.where(place < cuts, 1, 2).astype(np.int32),
        "positions": np.where(place < cuts, place, place - cuts).astype(np.int32),
    }

    def metrics_of(batch: dict[str, np.ndarray]) -> StepMetrics:
        state = run.state()
        # Large weights of the blocks make the effect of attention visible.
        blocks = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, state.params["blocks"])
        state = dataclasses.replace(state, params={**state.params, "blocks": blocks})
        return jax.device_get(run.step_fn(state, run.put(batch))[1])

    expected, found = metrics_of(alone), metrics_of(packed | channels)
    assert found["targets"] == expected["targets"] > 32
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    # RoPE depends only on distances, so only other distances show that positions arrive.
    stretched = channels | {"positions": channels["positions"] * 5}
    for other in (metrics_of(packed), metrics_of(packed | stretched)):
        assert abs(other["loss"] / expected["loss"] - 1) > 1e-4


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_updates_nothing(
    prepare: Callable, make_batch: Callable, fault: str
) -> None:
    run = prepare(1)
    bad = make_batch(5)
    if fault == "loss":
        bad["weights"][3, 3] = np.inf
    else:
        # The sum of the weights is 0, so the loss is divided by 1. The loss is finite, but the
        # square of the gradient is not finite.
        bad["weights"] = np.zeros((8, 16), np.float32)
        bad["weights"][0, 3], bad["weights"][1, 3] = HUGE, -HUGE
    good = [make_batch(0), make_batch(1)]
    before, _ = train(run, good)
    state, metrics = train(run, [*good, bad, bad])
    assert np.isfinite(metrics[2]["loss"]) == (fault == "gradient")
    assert not np.isfinite(metrics[2]["grad_norm"])
    assert [bool(m["skipped"]) for m in metrics] == [False, False, True, True]
    assert [int(m["bad_steps"]) for m in metrics] == [0, 0, 1, 2]
    assert (int(state.step), int(state.bad_steps)) == (4, 2)
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.optimizer, before.optimizer)

    state, values = run.step_fn(state, run.put(good[0]))
    assert (int(state.step), int(state.bad_steps), bool(values["skipped"])) == (5, 0, False)
    # The schedule does not count skipped steps, so this step is the third update.
    _, expected = train(run, [*good, good[0]])
    assert float(values["learning_rate"]) == expected[2]["learning_rate"]
    assert float(values["loss"]) == expected[2]["loss"]


@pytest.mark.parametrize("damage", ["variance", "momentum", "embedding row"])
def test_damaged_state_is_noticed_before_it_spreads(
    prepare: Callable, make_batch: Callable, damage: str
) -> None:
    """A single number of the state is wrong, as after a memory fault."""
    run = prepare(1)
    state, _ = train(run, [make_batch(0)])
    if damage == "embedding row":
        table = state.params["embedding"]["table"]
        embedding = {"table": table.at[make_batch(1)["tokens"][0, 0], 0].set(np.nan)}
        state = dataclasses.replace(state, params={**state.params, "embedding": embedding})
    else:
        # A negative variance has no square root.
        name, wrong = {"variance": ("nu", -1.0), "momentum": ("mu", np.inf)}[damage]
        moments = optax.tree.get(state.optimizer, name)
        moments["embedding"]["table"] = moments["embedding"]["table"].at[0, 0].set(wrong)
        optimizer = optax.tree.set(state.optimizer, **{name: moments})
        state = dataclasses.replace(state, optimizer=optimizer)
    before = jax.device_get(state)
    for bad_steps in (1, 2):
        state, metrics = run.step_fn(state, run.put(make_batch(bad_steps)))
        assert np.isfinite(metrics["loss"]) == (damage != "embedding row")
        assert np.isfinite(metrics["grad_norm"]) == (damage != "embedding row")
        assert not np.isfinite(metrics["update_norm"])
        assert (bool(metrics["skipped"]), bool(metrics["spike"])) == (True, False)
        assert int(metrics["bad_steps"]) == int(metrics["skipped_steps"]) == bad_steps
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.optimizer, before.optimizer)


def test_state_is_donated_and_the_batch_is_not(prepare: Callable, make_batch: Callable) -> None:
    run = prepare(1)
    old, batch = run.state(), run.put(make_batch(0))
    new, _ = run.step_fn(old, batch)
    leaves = jax.tree.leaves((old.params, old.optimizer, old.step))
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_steps_after_the_first_compile_nothing(
    prepare: Callable, make_batch: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare(1)
    state, _ = run.step_fn(run.state(), run.put(make_batch(0)))
    batches = [run.put(make_batch(seed)) for seed in range(4)]

    def compiled() -> int:
        return sum("Compiling jit(" in record.getMessage() for record in caplog.records)

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for batch in batches:
            state, _ = run.step_fn(state, batch)
        assert compiled() == 0
        jax.jit(lambda x: x + 1)(np.zeros(3))  # the log shows compilations
        assert compiled() == 1


def test_loss_chunk_counts_the_tokens_of_a_device(config: Any) -> None:
    def positions(loss_chunk: int, rows: int, shards: int) -> int:
        train = dataclasses.replace(config.train, loss_chunk=loss_chunk)
        return chunk_positions(dataclasses.replace(config, train=train), rows, shards)

    assert positions(20, 8, 1) == 2
    assert positions(20, 8, 4) == 10
    assert positions(4096, 8, 4) == 16  # the length of the sequence is the largest chunk
    assert positions(1, 8, 1) == 1  # the smallest chunk is one position
    assert positions(20, 2, 8) == 16
