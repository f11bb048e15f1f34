import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import Config, MeshConfig
from mobilellm_jax.sharding import logical_rules, make_mesh
from mobilellm_jax.train.loss import token_losses, weighted_loss
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state
from mobilellm_jax.train.step import make_train_step

B, T, D, V = 2, 11, 8, 37


def naive_losses(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes all logits at once, and uses the log-softmax of jax."""
    log_probs = jax.nn.log_softmax(x.astype(jnp.float32) @ head.astype(jnp.float32).T, axis=-1)
    return -jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[:, :, 0]


def naive_loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(naive_losses(x, head, targets) * weights)


@functools.cache
def inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    weights = rng.uniform(0.5, 2, (B, T)).astype(np.float32)
    weights[0, :3] = weights[1, -1] = 0
    return jnp.asarray(x), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights)


def value_and_gradients(loss: Callable[..., jax.Array], *arguments: Any) -> Any:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments)


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))


@functools.cache
def expected() -> Any:
    return value_and_gradients(naive_loss, *inputs())


# For 11 positions: 4 leaves a last chunk of 3, 11 makes one chunk, 64 is larger than the sequence.
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_value_and_gradients_are_those_of_the_whole_softmax(chunk: int) -> None:
    value, gradients = expected()
    found, found_gradients = value_and_gradients(lambda *a: weighted_loss(*a, chunk), *inputs())
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        assert ours.dtype == jnp.float32
        assert relative_error(ours, theirs) < 1e-5
    grad_x, weights = np.asarray(found_gradients[0]), np.asarray(inputs()[3])
    np.testing.assert_array_equal(grad_x[weights == 0], 0)
    assert (np.abs(grad_x[weights > 0]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("chunk", [4, 64])
def test_every_token_has_its_own_loss(chunk: int) -> None:
    x, head, targets, _ = inputs()
    found = jax.jit(functools.partial(token_losses, chunk=chunk))(x, head, targets)
    np.testing.assert_allclose(found, naive_losses(x, head, targets), rtol=1e-6, atol=1e-6)


def test_what_follows_the_loss_scales_its_gradient() -> None:
    def around(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        # The slope of the logarithm depends on the value, so the cotangent is not a constant.
        return lambda *a: 2 * loss(*a) + jnp.log(loss(*a))

    value, gradients = value_and_gradients(around(naive_loss), *inputs())
    found, found_gradients = value_and_gradients(around(lambda *a: weighted_loss(*a, 4)), *inputs())
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    for ours, theirs, alone in zip(found_gradients, gradients, expected()[1], strict=True):
        assert relative_error(ours, theirs) < 1e-5
        assert relative_error(alone, theirs) > 0.4


def test_large_logits_overflow_nothing() -> None:
    x, head, targets, weights = inputs()
    value, gradients = value_and_gradients(naive_loss, x * 300, head, targets, weights)
    found, found_gradients = value_and_gradients(
        lambda *a: weighted_loss(*a, 4), x * 300, head, targets, weights
    )
    assert np.isfinite(found)
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    assert relative_error(found_gradients[0], gradients[0]) < 1e-5


def test_bfloat16_states_give_a_float32_loss() -> None:
    x, head, targets, weights = inputs()
    narrow_x, narrow_head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    value, (grad_x, grad_head) = value_and_gradients(
        lambda *a: weighted_loss(*a, 4), narrow_x, head, targets, weights
    )
    losses = token_losses(narrow_x, head, targets, 4)
    assert (value.dtype, losses.dtype) == (jnp.float32, jnp.float32)
    assert (grad_x.dtype, grad_head.dtype) == (jnp.bfloat16, jnp.float32)
    # Products of bfloat16 numbers are exact in float32, and the sums are float32. So only the
    # operands and the gradient of the logits are rounded (to 8 bits).
    rounded = (narrow_x.astype(jnp.float32), narrow_head.astype(jnp.float32), targets, weights)
    rounded_value, gradients = value_and_gradients(naive_loss, *rounded)
    assert float(value) == pytest.approx(float(rounded_value), rel=1e-6)
    assert relative_error(grad_x, gradients[0]) < 2**-7
    assert relative_error(grad_head, gradients[1]) < 2**-7


def test_memory_does_not_hold_the_logits_of_all_tokens() -> None:
    vocab_size, chunk = 4096, 16

    def temporary_bytes(loss: Callable[..., jax.Array], length: int) -> int:
        shapes = (
            jax.ShapeDtypeStruct((1, length, D), jnp.float32),
            jax.ShapeDtypeStruct((vocab_size, D), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            jax.ShapeDtypeStruct((1, length), jnp.float32),
        )
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    growth = {
        name: temporary_bytes(loss, 512) - temporary_bytes(loss, 32)
        for name, loss in (("ours", lambda *a: weighted_loss(*a, chunk)), ("naive", naive_loss))
    }
    logits_bytes = (512 - 32) * vocab_size * 4
    assert growth["naive"] >= logits_bytes  # the measurement detects logits in memory
    assert growth["ours"] < 0.02 * logits_bytes


def test_memory_of_the_step_does_not_grow_by_the_logits_of_more_tokens(config: Config) -> None:
    """The vocabulary is so large that the logits of a token outweigh its other arrays."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    vocab_size = 2**18

    def temporary_bytes(seq_len: int, loss_chunk: int) -> int:
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model, vocab_size=vocab_size, num_blocks=1, max_seq_len=seq_len
            ),
            data=dataclasses.replace(config.data, seq_len=seq_len),
            train=dataclasses.replace(config.train, global_batch=1, loss_chunk=loss_chunk),
        )
        optimizer = make_optimizer(changed.optimizer, changed.train.steps)
        rules = logical_rules(changed.model, mesh.shape)
        state = abstract_state(changed, optimizer, mesh, rules)
        row = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
        batch = {"tokens": row, "targets": row, "weights": jax.ShapeDtypeStruct((1, seq_len), "f4")}
        step = make_train_step(changed, optimizer, mesh, rules, state)
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = (256 - 32) * vocab_size * 4
    short = temporary_bytes(32, loss_chunk=8)
    assert temporary_bytes(256, loss_chunk=8) - short < 0.02 * logits_bytes
    # With one chunk, the measurement detects logits.
    assert temporary_bytes(256, loss_chunk=256) - short >= logits_bytes
