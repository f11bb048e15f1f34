import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mobilellm_jax.config import Config, OptimizerConfig
from mobilellm_jax.model.transformer import param_shapes
from mobilellm_jax.train.optimizer import is_matrix, learning_rate, make_optimizer, muon_axes

PEAK = 0.4


# The schedules have 10 steps of warm-up and 100 steps in all. The decay of "wsd" takes 20 steps.
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
    # The cosine is 0.04 + 0.36 (1 + cos(pi t / 90)) / 2 with t = 30, 45, 60.
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-7), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedule_without_warm_up_starts_at_the_peak(schedule: Any) -> None:
    rate = learning_rate(OptimizerConfig(peak_lr=PEAK, warmup_steps=0, schedule=schedule), 7)
    assert float(rate(0)) == pytest.approx(PEAK)


def test_wsd_falls_only_after_a_long_warm_up() -> None:
    # After the warm-up, 3 steps are left. A fifth of all steps would be 4.
    config = OptimizerConfig(peak_lr=PEAK, warmup_steps=17, schedule="wsd", min_lr_ratio=0.25)
    rate = learning_rate(config, 20)
    found = [float(rate(step)) for step in (16, 17, 18, 19, 20)]
    assert found == pytest.approx([PEAK * 16 / 17, PEAK, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_decay_is_for_all_but_the_norms(config: Config, activation: Any) -> None:
    model = dataclasses.replace(config.model, tie_embeddings=False, activation=activation)
    params = param_shapes(model)
    flat = traverse_util.flatten_dict(is_matrix(params), sep="/")
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
    """Computes algorithm 2 of Loshchilov and Hutter in float64, after clipping."""
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_orthogonalises_every_block_and_leaves_the_rest_to_adamw(
    config: Config, weight_decay: float
) -> None:
    model = dataclasses.replace(config.model, tie_embeddings=False)
    shapes = param_shapes(model)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params, gradient = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)

    def updates(name: Any) -> dict[str, np.ndarray]:
        settings = OptimizerConfig(
            name=name, peak_lr=PEAK, warmup_steps=0, clip_norm=0.0, weight_decay=weight_decay
        )
        optimizer = make_optimizer(settings, 10)
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        return traverse_util.flatten_dict(update, sep="/")

    muon, adamw = updates("muon"), updates("adamw")
    flat_gradient = traverse_util.flatten_dict(gradient, sep="/")
    flat_params = traverse_util.flatten_dict(params, sep="/")
    inputs = {"output": 2}  # heads and head_dim are inputs; the other matrices have one input axis
    for name, update in muon.items():
        if not name.startswith("blocks/") or name.endswith("scale"):
            np.testing.assert_allclose(update, adamw[name], rtol=1e-6)
            continue
        axes = inputs.get(name.split("/")[-1], 1)
        rows = int(np.prod(update.shape[1 : 1 + axes]))
        for u in range(update.shape[0]):
            moved = update[u] + PEAK * weight_decay * flat_params[name][u]
            matrix = np.reshape(-moved / PEAK, (rows, -1))
            left, _, right = np.linalg.svd(
                np.reshape(flat_gradient[name][u], (rows, -1)), full_matrices=False
            )
            polar = left @ right
            # Five Newton-Schulz iterations bring singular values to 0.7 ... 1.2, not to 1. A
            # tenth of them, the smallest, may stay lower. The directions equal the exact factor.
            cosine = np.sum(matrix * polar) / np.linalg.norm(matrix) / np.linalg.norm(polar)
            assert cosine > 0.95, name
            # The root mean square is 0.2 like AdamW's, up to the error of the singular values.
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2, rel=0.25), name


def test_muon_takes_each_matrix_as_inputs_by_outputs(config: Config) -> None:
    axes = muon_axes(param_shapes(config.model))
    assert axes["embedding"]["table"] is None
    assert axes["blocks"]["attention_norm"]["scale"] is None
    assert tuple(axes["blocks"]["attention"]["output"]) == ((1, 2), 3)
    assert tuple(axes["blocks"]["attention"]["query"]) == (1, (2, 3))
