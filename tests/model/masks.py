"""Masks written out, for comparison with what needs none."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal_mask(
    segments_BT: Int[Array, "B T"] | None, length: int
) -> Bool[Array, "#B {length} {length}"]:
    """Returns the mask under which a token sees itself and earlier ones of its own segment."""
    causal_1TS = jnp.tril(jnp.ones((1, length, length), bool))
    if segments_BT is None:
        return causal_1TS
    return causal_1TS & (segments_BT[:, :, None] == segments_BT[:, None, :])
