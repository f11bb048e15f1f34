"""One decoder block: attention and feed-forward, each after a norm and with a residual sum.

This is the only decoder block in JAX. Training and prefill scan over it (`layer_sharing.py`).
Decoding and the StableHLO export call it layer after layer (`decoding.py`). The callers differ only
in the `attend` that they pass: it says which keys and values a query sees and where new ones go.

A block is the unit that layer sharing repeats (paper Fig. 6: attention and feed-forward together).
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attend, Attention
from mobilellm_jax.model.feed_forward import FeedForward
from mobilellm_jax.model.norm import RMSNorm
from mobilellm_jax.model.rope import Rotation


class Block(nn.Module):
    """Computes x + attention(norm(x)), and then x + feed_forward(norm(x))."""

    config: ModelConfig

    def setup(self) -> None:
        self.attention_norm = RMSNorm(self.config.norm_eps)
        self.attention = Attention(self.config)
        self.feed_forward_norm = RMSNorm(self.config.norm_eps)
        self.feed_forward = FeedForward(self.config)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], turn: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the residual stream after the block, and the second result of `attend`."""
        out_BTD, kept = self.attention(self.attention_norm(x_BTD), turn, attend)
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "activation_embed")), kept
