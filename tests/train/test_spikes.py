"""Compares the guard against spikes with its definition on lists."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.train.spikes import WINDOW_STEPS, judge, nothing_yet

FACTOR = 4.0
HALF = WINDOW_STEPS // 2


def expected_spikes(losses: list[float], norms: list[float], factor: float) -> list[bool]:
    """Computes the definition, with a list of remembered values for losses and one for norms."""
    memory: tuple[list[float], list[float]] = ([], [])
    spikes = []
    for values in zip(losses, norms, strict=True):
        if not all(map(math.isfinite, values)):
            spikes.append(False)
            continue
        found = False
        for kept, value in zip(memory, values, strict=True):
            limit = math.inf
            if factor and len(kept) >= HALF:
                late = np.array(kept[-WINDOW_STEPS:], np.float64)
                limit = late.mean() + factor * late.std()
            found |= value > limit
            kept.append(min(value, limit))
        spikes.append(found)
    return spikes


def found_spikes(losses: list[float], norms: list[float], factor: float) -> list[bool]:
    def step(recent, values):
        loss, norm = values
        spike, recent = judge(recent, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm), factor)
        return recent, spike

    values = (jnp.array(losses, jnp.float32), jnp.array(norms, jnp.float32))
    return jax.lax.scan(step, nothing_yet(), values)[1].tolist()


def noise(seed: int, steps: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    return (3 + rng.normal(0, 0.1, steps)).tolist(), (1 + rng.normal(0, 0.1, steps)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_the_definition(seed: int) -> None:
    losses, norms = noise(seed, 5 * HALF)
    rng = np.random.default_rng(seed + 10)
    for step in rng.choice(len(losses), 30, replace=False):
        # These values are far from every limit, so float32 and float64 give the same result.
        (losses, norms)[step % 2][step] = rng.choice([9.0, 50.0, 1e4, math.nan, math.inf])
    expected = expected_spikes(losses, norms, FACTOR)
    assert 5 < sum(expected) < 30
    assert found_spikes(losses, norms, FACTOR) == expected


def test_nothing_is_a_spike_before_half_a_window_or_without_a_factor() -> None:
    losses, norms = noise(0, HALF)
    assert not any(found_spikes([*losses[:-1], 100.0], norms, FACTOR))
    assert found_spikes([*losses, 100.0], [*norms, 1.0], FACTOR)[-1]
    assert found_spikes([*losses, 3.0], [*norms, 100.0], FACTOR)[-1]
    assert not any(found_spikes([*losses, 100.0], [*norms, 100.0], 0.0))


def test_a_level_that_stays_higher_is_followed() -> None:
    """A guard that did not remember the skipped steps would skip all later steps."""
    losses, norms = noise(0, 3 * WINDOW_STEPS)
    higher = losses[:WINDOW_STEPS] + [loss + 5 for loss in losses[WINDOW_STEPS:]]
    spikes = found_spikes(higher, norms, FACTOR)
    assert spikes[WINDOW_STEPS]
    assert not any(spikes[WINDOW_STEPS + HALF :])


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_spikes_updates_nothing(
    prepare: Callable, make_batch: Callable, what: str
) -> None:
    """The recent values of the state are small, so the step counts as a spike."""
    run = prepare(1, spike_factor=FACTOR)
    small_W = jnp.full(WINDOW_STEPS, 1e-3)
    level = {"loss": "loss_W", "gradient norm": "grad_norm_W"}
    large = {name: jnp.full(WINDOW_STEPS, 1e3) for name in level.values()}
    recent = dataclasses.replace(
        nothing_yet(), seen=jnp.int32(WINDOW_STEPS), **{**large, level[what]: small_W}
    )
    state = dataclasses.replace(run.state(), recent=jax.tree.map(jnp.copy, recent))
    before = jax.device_get((state.params, state.optimizer))
    state, metrics = run.step_fn(state, run.put(make_batch(0)))
    assert (bool(metrics["skipped"]), bool(metrics["spike"])) == (True, True)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["update_norm"])
    assert (int(metrics["bad_steps"]), int(metrics["skipped_steps"])) == (0, 1)
    after = jax.device_get((state.params, state.optimizer))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # Without the guard, the same step is not skipped.
    plain = prepare(1)
    state = dataclasses.replace(plain.state(), recent=recent)
    assert not plain.step_fn(state, plain.put(make_batch(0)))[1]["skipped"]
