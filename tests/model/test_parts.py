"""Norm, rotation and feed-forward are compared with NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.block import FeedForward, RMSNorm
from mobilellm_jax.model.rope import rotate, rotation

RNG = np.random.default_rng(0)


def test_norm_equals_its_formula() -> None:
    x = RNG.normal(size=(2, 3, 5)) * 4
    scale = RNG.normal(size=5)
    params = {"scale": jnp.asarray(scale, jnp.float32)}
    out = RMSNorm(eps=1e-2).apply({"params": params}, jnp.asarray(x, jnp.float32))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32() -> None:
    # A bfloat16 sum of 1000 terms of 300^2 would keep only the first digits.
    x = jnp.full((1, 1, 1000), 300.0, jnp.bfloat16)
    out = RMSNorm(eps=1e-5).apply({"params": {"scale": jnp.ones(1000)}}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)


def heads(head_dim: int, rope_theta: float) -> ModelConfig:
    return ModelConfig(head_dim=head_dim, rope_theta=rope_theta)


def test_rotation_turns_pairs_by_their_angles() -> None:
    x = RNG.normal(size=(1, 4, 2, 6))
    positions = np.array([[0, 1, 5, 100]], np.int32)
    out = rotate(jnp.asarray(x, jnp.float32), rotation(jnp.asarray(positions), heads(6, 100.0)))
    for pair in range(3):
        angle = positions[0] * 100.0 ** (-2 * pair / 6)
        turned = (x[0, :, :, pair] + 1j * x[0, :, :, pair + 3]) * np.exp(1j * angle)[:, None]
        # A float32 angle of 100 radians has an error of about 1e-5.
        np.testing.assert_allclose(out[0, :, :, pair], turned.real, atol=3e-5)
        np.testing.assert_allclose(out[0, :, :, pair + 3], turned.imag, atol=3e-5)


def test_rotated_scores_depend_on_distance_only() -> None:
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(query: int, key: int) -> float:
        at = [rotation(jnp.asarray([[p]], jnp.int32), heads(8, 10_000.0)) for p in (query, key)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu"])
def test_feed_forward_equals_its_formula(activation: str) -> None:
    config = ModelConfig(embed_dim=5, ffn_dim=7, activation=activation, compute_dtype="float32")
    x = RNG.normal(size=(1, 2, 5)) * 2
    names = ["gate", "up", "down"] if activation == "swiglu" else ["up", "down"]
    kernels = {n: RNG.normal(size=(7, 5) if n == "down" else (5, 7)) for n in names}
    params = {n: jnp.asarray(w, jnp.float32) for n, w in kernels.items()}
    out = FeedForward(config).apply({"params": params}, jnp.asarray(x, jnp.float32))
    up = x @ kernels["up"]
    hidden = {
        "swiglu": lambda: (g := x @ kernels["gate"]) / (1 + np.exp(-g)) * up,
        "relu": lambda: np.maximum(up, 0),
        "gelu": lambda: up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))),
    }[activation]()
    np.testing.assert_allclose(out, hidden @ kernels["down"], rtol=1e-5, atol=1e-5)


def test_two_matrix_feed_forward_has_no_gate() -> None:
    config = ModelConfig(embed_dim=5, ffn_dim=7, activation="relu")
    params = FeedForward(config).init(jax.random.key(0), jnp.zeros((1, 1, 5)))["params"]
    assert set(params) == {"up", "down"}
