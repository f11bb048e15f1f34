"""The feed-forward: SwiGLU (Shazeer 2020, arXiv:2002.05202), or the paper's two-matrix baseline.

SwiGLU is the first step of the paper's roadmap (Sec. 2.1, Table 10): silu(x gate) * (x up), then
down. `relu` and `gelu` have no gate: act(x up), then down.
"""

from typing import cast

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.parameters import matrix
from mobilellm_jax.model.products import product


class FeedForward(nn.Module):
    """Widens to ffn_dim, applies the activation and narrows again; no biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        width, hidden = config.embed_dim, config.ffn_dim

        def widen(name: str) -> Float[Array, "B T F"]:
            kernel_DF = matrix(self, name, (width, hidden), ("embed", "mlp"))
            wide_BTF = product("BTD,DF->BTF", x_BTD, kernel_DF)
            return cast(jax.Array, checkpoint_name(wide_BTF, name))

        if config.activation == "swiglu":
            hidden_BTF = jax.nn.silu(widen("gate")) * widen("up")
        elif config.activation == "relu":
            hidden_BTF = jax.nn.relu(widen("up"))
        else:
            hidden_BTF = jax.nn.gelu(widen("up"), approximate=False)
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        kernel_FD = matrix(self, "down", (hidden, width), ("mlp", "embed"))
        return product("BTF,FD->BTD", hidden_BTF, kernel_FD)
