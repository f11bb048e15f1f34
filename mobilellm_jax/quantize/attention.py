"""Attention with 8-bit integer multiplications, and caches that keep 8-bit rows.

Queries, keys and values have one scale per token and head. The multiplication of softmax weights
with values sums over the tokens, so the scales of the values cannot be moved out of the sum. The
code multiplies the softmax weights by these scales before it quantizes the weights. Each query then
needs only one scale. Tokens that the mask hides change no scale.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from mobilellm_jax.model.softmax import AttentionProducts, Keys, Rows
from mobilellm_jax.quantize.integers import integer_einsum, to_rows, tokens_on_levels


@struct.dataclass
class QuantizedAttention(AttentionProducts):
    """Says which parts of attention a model computes in 8 bits; holds no arrays."""

    products: bool = struct.field(pytree_node=False, default=False)
    cache: bool = struct.field(pytree_node=False, default=False)

    @property
    def fast_attention(self) -> bool:
        return not self.products

    def scores(
        self, q_GTH: Float[Array, "*lead G T H"], k_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T S"]:
        if not self.products:
            return super().scores(q_GTH, k_SH)
        q, k = to_rows(q_GTH), to_rows(k_SH)
        sums_GTS = integer_einsum("...GTH,...SH->...GTS", q.values, k.values)
        return sums_GTS.astype(jnp.float32) * q.scale * _over_keys(k.scale)

    def average(
        self, weights_GTS: Float[Array, "*lead G T S"], v_SH: Float[Array, "*lead S H"]
    ) -> Float[Array, "*lead G T H"]:
        if not self.products:
            return super().average(weights_GTS, v_SH)
        v = to_rows(v_SH)
        weights = to_rows(weights_GTS * _over_keys(v.scale))
        sums_GTH = integer_einsum("...GTS,...SH->...GTH", weights.values, v.values)
        return sums_GTH.astype(jnp.float32) * weights.scale

    def rounded(self, x_BTKH: Keys) -> Keys:
        return tokens_on_levels(x_BTKH) if self.cache else x_BTKH

    def rows(self, x: Float[Array, "*rows H"]) -> Rows:
        return to_rows(x) if self.cache else x


def _over_keys(scale_S1: Float[Array, "*lead S 1"]) -> Float[Array, "*lead 1 1 S"]:
    return scale_S1.swapaxes(-1, -2)[..., None, :, :]
