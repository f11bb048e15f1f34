"""Attention equals its definition, and causal attention in blocks equals attention with a mask."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mobilellm_jax.model.softmax import attend_by_token, causal_attention, causal_mask


def naive(
    q_BTNH: np.ndarray, k_BSKH: np.ndarray, v_BSKH: np.ndarray, mask_BTS: np.ndarray
) -> np.ndarray:
    """Computes attention by its definition in float64, one query at a time."""
    batch, length, heads, head_dim = q_BTNH.shape
    group = heads // k_BSKH.shape[2]
    out_BTNH = np.zeros(q_BTNH.shape)
    for b, t, n in np.ndindex(batch, length, heads):
        seen_S = mask_BTS[b if len(mask_BTS) > 1 else 0, t]
        k_SH, v_SH = k_BSKH[b, seen_S, n // group], v_BSKH[b, seen_S, n // group]
        scores_S = k_SH @ q_BTNH[b, t, n] / np.sqrt(head_dim)
        weights_S = np.exp(scores_S - scores_S.max())
        out_BTNH[b, t, n] = weights_S @ v_SH / weights_S.sum()
    return out_BTNH


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_equals_the_definition(heads: int, kv_heads: int) -> None:
    rng = np.random.default_rng(heads)
    q = rng.normal(size=(2, 7, heads, 8)) * 3
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 8))
    segments_BT = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2]], np.int32)
    mask = causal_mask(7, jnp.asarray(segments_BT))
    out = attend_by_token(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    # The tolerance allows for float32 sums of 7 terms of size 3.
    np.testing.assert_allclose(out, naive(q, k, v, np.asarray(mask)), atol=2e-6)


def test_large_scores_stay_finite() -> None:
    q = jnp.full((1, 3, 1, 4), 1e4)
    value = attend_by_token(q, q, q, causal_mask(3, None))
    gradient = jax.grad(lambda x: attend_by_token(x, x, x, causal_mask(3, None)).sum())(q)
    np.testing.assert_allclose(value, 1e4)
    assert jnp.isfinite(gradient).all()


def test_mask_is_causal_and_keeps_documents_apart() -> None:
    mask = causal_mask(4, jnp.asarray([[1, 1, 2, 2]], jnp.int32))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def arrays(length: int, heads: int = 6, kv_heads: int = 2) -> list[jax.Array]:
    """Returns q, k, v and the gradient of the output."""
    rng = np.random.default_rng(length)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def documents(length: int) -> jax.Array:
    """Returns segments with borders inside blocks, a long document, and documents of one token."""
    places = np.arange(length)
    rows = [places // 90, np.where(places < length // 2, 0, places)]
    return jnp.asarray(np.stack(rows), jnp.int32)


def output_and_gradients(
    function: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array
) -> list[np.ndarray]:
    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(function, q, k, v)
        return out, *pull_back(grad.astype(out.dtype))

    return [np.asarray(x, np.float64) for x in both(q, k, v, grad)]


# The lengths give one block, two unequal blocks, and the largest number of blocks. The key heads
# give groups of one head, of three heads, and of all heads.
@pytest.mark.parametrize(
    ("length", "kv_heads", "split"),
    [
        (1, 2, False),
        (70, 2, True),
        (301, 1, True),
        (301, 1, False),
        (1100, 2, True),
        (256, 6, True),
    ],
)
def test_equals_attention_with_a_mask(length: int, kv_heads: int, split: bool) -> None:
    *qkv, grad = arrays(length, kv_heads=kv_heads)
    segments = documents(length) if split else None
    mask = causal_mask(length, segments)
    found = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, segments), *qkv, grad)
    expected = output_and_gradients(lambda q, k, v: attend_by_token(q, k, v, mask), *qkv, grad)
    for name, ours, theirs in zip(("out", "q", "k", "v"), found, expected, strict=True):
        # Both sides sum the same float32 terms in another order. The gradients of a single token
        # cancel.
        error = np.linalg.norm(ours - theirs) / max(*map(np.linalg.norm, (theirs, grad)))
        assert error < 2e-6, name


def test_bfloat16_is_as_near_to_float32_as_its_rounding() -> None:
    *qkv, grad = arrays(300)
    narrow = [x.astype(jnp.bfloat16) for x in qkv]
    wide = [x.astype(jnp.float32) for x in narrow]
    found = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, None), *narrow, grad)
    expected = output_and_gradients(lambda q, k, v: causal_attention(q, k, v, None), *wide, grad)
    for name, ours, theirs in zip(("out", "q", "k", "v"), found, expected, strict=True):
        # bfloat16 has 8 bits: errors of at most 0.4% in operands and results, which average out.
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 6e-3, name


def test_large_scores_of_blocks_stay_finite() -> None:
    q = jnp.full((1, 300, 1, 4), 1e4)
    value, gradient = jax.value_and_grad(lambda x: causal_attention(x, x, x, None).sum())(q)
    np.testing.assert_allclose(value / q.size, 1e4)
    assert jnp.isfinite(gradient).all()


def test_no_array_holds_all_scores() -> None:
    *qkv, grad = arrays(1024)
    with_gradient = jax.jit(
        lambda q, k, v, g: jax.vjp(lambda *x: causal_attention(*x, None), q, k, v)[1](g)
    )
    text = with_gradient.lower(*qkv, grad).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    whole = 2 * 6 * 1024 * 1024
    assert max(sizes) <= whole / 8  # the last block has an eighth of the queries and all keys


def test_one_block_where_the_sequence_is_split_over_devices() -> None:
    """With several blocks, one device would work on a block while the other devices wait."""
    *qkv, _ = arrays(512)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))

    def products(**context: bool) -> int:
        program = jax.make_jaxpr(lambda q, k, v: causal_attention(q, k, v, None))(*qkv)
        return str(program).count("dot_general")

    assert products() == 8
    with jax.set_mesh(mesh):
        assert products() == 2
