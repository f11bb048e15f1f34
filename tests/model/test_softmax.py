"""Softmax attention is compared with its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.model.softmax import attend_by_token, causal_mask


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
