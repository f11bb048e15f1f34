"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), before attention, feed-forward and head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobilellm_jax.model.parameters import norm_scale


def rms_norm(
    x_BTD: Float[Array, "B T D"], scale_D: Float[Array, "D"], eps: float
) -> Float[Array, "B T D"]:
    """Returns x / sqrt(mean(x^2) + eps) * scale, computed in float32, in the type of x."""
    wide_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
    normed_BTD = wide_BTD * jax.lax.rsqrt(mean_square_BT1 + eps)
    return (normed_BTD * scale_D[None, None, :]).astype(x_BTD.dtype)


class RMSNorm(nn.Module):
    """Applies `rms_norm` with a trained scale."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, norm_scale(self, "scale", x_BTD.shape[-1]), self.eps)
