"""One decoder block: attention and feed-forward, each behind a norm and around a residual.

A block is the unit that layer sharing repeats (paper Fig. 6: MHSA and FFN together).
"""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attention, AttentionContext
from mobilellm_jax.model.cache import KVCache
from mobilellm_jax.model.feed_forward import FeedForward
from mobilellm_jax.model.norm import RMSNorm


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: ModelConfig

    def setup(self) -> None:
        self.attention_norm = RMSNorm(self.config.norm_eps)
        self.attention = Attention(self.config)
        self.feed_forward_norm = RMSNorm(self.config.norm_eps)
        self.feed_forward = FeedForward(self.config)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: AttentionContext,
        cache: KVCache | None,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        out_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache, slot)
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "activation_embed")), cache
