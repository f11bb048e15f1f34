import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mobilellm_jax.config import Config, OptimizerConfig
from mobilellm_jax.model.transformer import init_boxed
from mobilellm_jax.train.optimizer import is_matrix, learning_rate, make_optimizer

PEAK = 0.4


# Warm-up over 10 of 100 steps, then 90 steps of decay, or of plateau with 20 of decay at the end.
@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0: 0, 1: 0.04, 5: 0.2, 10: 0.4, 40: 0.31, 55: 0.22, 70: 0.13, 100: 0.04}),
        ("wsd", {0: 0, 5: 0.2, 10: 0.4, 50: 0.4, 80: 0.4, 85: 0.31, 90: 0.22, 100: 0.04}),
        ("constant", {0: 0, 5: 0.2, 10: 0.4, 50: 0.4, 100: 0.4}),
    ],
)
def test_schedule_by_hand(schedule: Any, values: dict[int, float]) -> None:
    config = OptimizerConfig(peak_lr=PEAK, warmup_steps=10, schedule=schedule, min_lr_ratio=0.1)
    rate = learning_rate(config, 100)
    # cosine: 0.04 + 0.36 (1 + cos(pi t / 90)) / 2 with t = 30, 45, 60.
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-7), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedule_without_warm_up_starts_at_the_peak(schedule: Any) -> None:
    rate = learning_rate(OptimizerConfig(peak_lr=PEAK, warmup_steps=0, schedule=schedule), 7)
    assert float(rate(0)) == pytest.approx(PEAK)


def test_wsd_falls_only_after_a_long_warm_up() -> None:
    # 3 steps are left where a fifth would be 4.
    config = OptimizerConfig(peak_lr=PEAK, warmup_steps=17, schedule="wsd", min_lr_ratio=0.25)
    rate = learning_rate(config, 20)
    found = [float(rate(step)) for step in (16, 17, 18, 19, 20)]
    assert found == pytest.approx([PEAK * 16 / 17, PEAK, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_decay_is_for_all_but_the_norms(config: Config, boxed: bool, activation: Any) -> None:
    model = dataclasses.replace(config.model, tie_embeddings=False, activation=activation)
    params = jax.eval_shape(functools.partial(init_boxed, model), jax.random.key(0))
    mask = is_matrix(params if boxed else nn.unbox(params))
    flat = traverse_util.flatten_dict(nn.unbox(mask), sep="/")
    norms = {
        "blocks/attention_norm/scale",
        "blocks/feed_forward_norm/scale",
        "final_norm/scale",
    }
    assert {name for name, decays in flat.items() if decays is False} == norms
    matrices = {name for name, decays in flat.items() if decays is True}
    assert {"embedding/table", "head/kernel", "blocks/feed_forward/down"} < matrices
    assert len(matrices) == (9 if activation == "swiglu" else 8)


def adamw_by_hand(
    config: OptimizerConfig, steps: int, params: dict[str, Any], gradients: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's algorithm 2 in float64, with clipping before it."""
    rate = learning_rate(config, steps)
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    for t, gradient in enumerate(gradients):
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, p in params.items():
            g = gradient[name] * clip
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            mean = first[name] / (1 - config.beta1 ** (t + 1))
            square = second[name] / (1 - config.beta2 ** (t + 1))
            decay = config.weight_decay if name == "kernel" else 0.0
            update = mean / (np.sqrt(square) + config.eps) + decay * p
            params[name] = p - float(rate(t)) * update
    return params


# The gradients have norms of about 8, 80 and 0.8, so that clipping changes their proportions.
@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 20.0])
def test_updates_are_those_of_adamw(clip_norm: float) -> None:
    config = OptimizerConfig(
        peak_lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 5), "scale": (5,)}
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    gradients = [
        {n: (size * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
        for size in (1.6, 16.0, 0.16)
    ]
    optimizer = make_optimizer(config, 10)

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    ours, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for gradient in gradients:
        ours, state = update(ours, state, gradient)
    by_hand = adamw_by_hand(config, 10, params, gradients)
    for name in shapes:
        np.testing.assert_allclose(ours[name], by_hand[name], rtol=1e-5, atol=1e-6)
    other = adamw_by_hand(
        OptimizerConfig(**{**vars(config), "clip_norm": 5.0}), 10, params, gradients
    )
    assert np.abs(other["kernel"] - by_hand["kernel"]).max() > 1e-3


def test_decay_does_not_pass_through_the_moments() -> None:
    config = OptimizerConfig(peak_lr=0.5, warmup_steps=0, schedule="constant", weight_decay=0.2)
    params = {"kernel": jnp.full((2, 3), 7.0), "scale": jnp.full((3,), 7.0)}
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    found = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found["kernel"], 7.0 * (1 - 0.5 * 0.2), rtol=1e-6)
    np.testing.assert_array_equal(found["scale"], 7.0)
