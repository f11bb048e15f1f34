import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.generation.sampling import Sampling, truncate


def naive_support(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Finds the kept tokens by the definition, in float64."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if top_k:
        order = order[:top_k]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    weights /= weights.sum()
    support: set[int] = set()
    reached = 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached >= top_p and support and top_p < 1:
            break
        support.add(token)
        reached += weight
    return support


@pytest.mark.parametrize("top_k", [0, 1, 3, 17, 64, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_truncate_keeps_what_the_definition_keeps(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(top_k)
    logits_BV = (3 * rng.standard_normal((4, 64))).astype(np.float32)
    logits_BV[1] = np.round(logits_BV[1]) + 0.0  # ties, without negative zeros
    logits_BV[2, 10] = 40.0  # one token has nearly all probability
    kept_BV = np.asarray(truncate(jnp.asarray(logits_BV), top_k, top_p))
    for row_V, kept_V in zip(logits_BV, kept_BV, strict=True):
        support = naive_support(row_V, top_k, top_p)
        assert set(np.flatnonzero(np.isfinite(kept_V))) == support
        tokens = sorted(support)
        np.testing.assert_array_equal(kept_V[tokens], row_V[tokens])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.01}, "top_p=1.01 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
    ],
)
def test_sampling_refuses_what_means_nothing(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]  # numbers of both kinds
