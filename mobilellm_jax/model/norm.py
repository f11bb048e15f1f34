"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), before attention, feed-forward and head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobilellm_jax.model.parameters import norm_scale


def rms_norm(
    x: Float[Array, "*rows D"], scale_D: Float[Array, "D"], eps: float
) -> Float[Array, "*rows D"]:
    """X / sqrt(mean(x^2) + eps) * scale, computed in float32, returned in the type of x."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + eps)
    scale = scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)
    return (normed * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a scale of its own."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, norm_scale(self, "scale", x_BTD.shape[-1]), self.eps)
