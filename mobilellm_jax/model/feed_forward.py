"""The feed-forward: SwiGLU (Shazeer 2020, arXiv:2002.05202), or the paper's two-matrix baseline.

SwiGLU is the first step of the paper's roadmap (Sec. 2.1, Table 10): silu(x gate) * (x up), then
down. `relu` and `gelu` have no gate: act(x up), then down.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mobilellm_jax.config import Activation, ModelConfig
from mobilellm_jax.model.parameters import matrix
from mobilellm_jax.model.products import Kernel, product

_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,  # of the gate
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


_JOINED = "gate_up"  # in the layout for decoding


class FeedForward(nn.Module):
    """Widens to ffn_dim, applies the activation and narrows again; no biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        width, hidden = config.embed_dim, config.ffn_dim
        activation = _ACTIVATIONS[config.activation]

        def widen(name: str) -> Float[Array, "B T F"]:
            kernel_DF = matrix(self, name, (width, hidden), ("embed", "mlp"))
            wide_BTF = product("BTD,DF->BTF", x_BTD, kernel_DF)
            return cast(jax.Array, checkpoint_name(wide_BTF, name))

        joined_DJF: Kernel | None = self.get_variable("params", _JOINED)
        if joined_DJF is not None:
            wide_BTJF = product("BTD,DJF->BTJF", x_BTD, joined_DJF)
            hidden_BTF = activation(wide_BTJF[:, :, 0]) * wide_BTJF[:, :, 1]
        elif config.activation == "swiglu":
            hidden_BTF = activation(widen("gate")) * widen("up")
        else:
            hidden_BTF = activation(widen("up"))
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        kernel_FD = matrix(self, "down", (hidden, width), ("mlp", "embed"))
        return product("BTF,FD->BTD", hidden_BTF, kernel_FD)


def for_decoding(feed_forward: dict[str, Any]) -> dict[str, Any]:
    """Replaces the gate and up matrices, if there are both, by one matrix."""
    if "gate" not in feed_forward:
        return feed_forward
    others = dict(feed_forward)
    parts = [others.pop(name) for name in ("gate", "up")]
    return {**others, _JOINED: jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *parts)}
