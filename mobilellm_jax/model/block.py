"""One decoder block: attention and feed-forward, each after a norm and with a residual sum.

This is the only decoder block in JAX. Training and prefill scan over it (`layer_sharing.py`).
Decoding and the StableHLO export call it layer after layer (`decoding.py`). The callers differ only
in the function `attend` that they pass. This function determines which keys and values a query
sees, and where it stores new keys and values.

A block is the unit that layer sharing repeats (paper Fig. 6: attention and feed-forward together).
"""

from collections.abc import Sequence
from typing import Any, assert_never, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mobilellm_jax.config import Activation, ModelConfig
from mobilellm_jax.model import attention
from mobilellm_jax.model.attention import Attend, Attention
from mobilellm_jax.model.products import Kernel, matrix, product
from mobilellm_jax.model.rope import Rotation

_JOINED = "gate_up"  # Name in the layout for decoding.


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Computes x / sqrt(mean(x^2) + eps) * scale in float32; the result has the type of x."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale_D: Any = self.param("scale", init, (x_BTD.shape[-1],), jnp.float32)
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        normed_BTD = wide_BTD * jax.lax.rsqrt(mean_square_BT1 + self.eps)
        scaled_BTD: jax.Array = normed_BTD * scale_D[None, None, :]
        return scaled_BTD.astype(x_BTD.dtype)


def activate(
    activation: Activation, wide: Sequence[Float[Array, "B T F"]]
) -> Float[Array, "B T F"]:
    """Applies the activation to the outputs of `ModelConfig.wide_matrices`."""
    match activation:
        case "swiglu":
            gate_BTF, up_BTF = wide
            return jax.nn.silu(gate_BTF) * up_BTF
        case "relu":
            [up_BTF] = wide
            return jax.nn.relu(up_BTF)
        case "gelu":
            [up_BTF] = wide
            return jax.nn.gelu(up_BTF, approximate=False)
        case _:
            assert_never(activation)


class FeedForward(nn.Module):
    """Projects to `ffn_dim`, applies the activation and projects back, without biases.

    SwiGLU (Shazeer 2020, arXiv:2002.05202) is the first step of the paper's roadmap (Sec. 2.1,
    Table 10): (silu(x gate) * (x up)) down, with the matrices gate, up and down. The paper's
    baselines `relu` and `gelu` have no gate matrix: activation(x up) down.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        width, hidden = config.embed_dim, config.ffn_dim

        def widen(name: str) -> Float[Array, "B T F"]:
            kernel_DF = matrix(self, name, (width, hidden), ("embed", "mlp"))
            wide_BTF = product("BTD,DF->BTF", x_BTD, kernel_DF)
            return cast(jax.Array, checkpoint_name(wide_BTF, name))

        joined_DJF: Kernel | None = self.get_variable("params", _JOINED)
        if joined_DJF is not None:
            wide_BTJF = product("BTD,DJF->BTJF", x_BTD, joined_DJF)
            wide = [wide_BTJF[:, :, j] for j in range(len(config.wide_matrices))]
        else:
            wide = [widen(name) for name in config.wide_matrices]
        hidden_BTF = activate(config.activation, wide)
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        kernel_FD = matrix(self, "down", (hidden, width), ("mlp", "embed"))
        return product("BTF,FD->BTD", hidden_BTF, kernel_FD)


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
        """Returns the residual stream after the block, and the memory that `attend` returns."""
        out_BTD, kept = self.attention(self.attention_norm(x_BTD), turn, attend)
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "activation_embed")), kept


def for_decoding(block: dict[str, Any]) -> dict[str, Any]:
    """Returns a block's matrices in the layout for decoding; joins gate and up if both exist."""
    feed_forward = dict(block["feed_forward"])
    if "gate" in feed_forward:
        parts = [feed_forward.pop(name) for name in ("gate", "up")]
        feed_forward[_JOINED] = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *parts)
    return {
        **block,
        "attention": attention.for_decoding(block["attention"]),
        "feed_forward": feed_forward,
    }
