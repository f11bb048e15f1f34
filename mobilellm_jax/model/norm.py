"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), before attention, feed-forward and head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32, returned in the type of x."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale_D = self.param("scale", init, (x_BTD.shape[-1],), jnp.float32)
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        normed_BTD = wide_BTD * jax.lax.rsqrt(mean_square_BT1 + self.eps)
        return (normed_BTD * scale_D[None, None, :]).astype(x_BTD.dtype)
