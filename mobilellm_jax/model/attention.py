"""Grouped-query causal attention (paper Sec. 2.4; Ainslie et al. 2023, arXiv:2305.13245)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention_kernels import self_attention
from mobilellm_jax.model.products import Kernel, matrix, product
from mobilellm_jax.model.rope import Rotation, rotate
from mobilellm_jax.model.softmax import (
    ATTENTION_PRODUCTS,
    IN_FLOAT,
    AttentionProducts,
    Keys,
    Queries,
    attend_by_token,
    causal_attention,
    causal_mask,
)

Attend = Callable[[Queries, Keys, Keys, AttentionProducts], tuple[Queries, Any]]
"""Maps rotated queries, rotated keys and values of new tokens to outputs of the heads and a memory.

`attend_within` keeps no memory. `cache.py` has the versions that keep a cache.
"""

_JOINED, _FLAT_OUTPUT = "query_key_value", "flat_output"  # Names in the layout for decoding.


class Attention(nn.Module):
    """Projects to heads, rotates queries and keys, attends, and projects back, without biases."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], turn: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the summand for the residual stream, and the memory that `attend` returns."""
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, turn), rotate(k_BTKH, turn)
        q_BTNH = nn.with_logical_constraint(q_BTNH, ("batch", "length", "heads", "head_dim"))
        products = self.get_variable("params", ATTENTION_PRODUCTS, IN_FLOAT)
        out_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH, products)
        flat_QD: Kernel | None = self.get_variable("params", _FLAT_OUTPUT)
        if flat_QD is not None:
            out_BTQ = out_BTNH.reshape(*x_BTD.shape[:2], -1)
            return product("BTQ,QD->BTD", out_BTQ, flat_QD), kept
        shape, axes = (config.num_heads, config.head_dim), ("heads", "head_dim", "embed")
        kernel_NHD = matrix(self, "output", (*shape, config.embed_dim), axes)
        return product("BTNH,NHD->BTD", out_BTNH, kernel_NHD), kept

    def _heads(self, x_BTD: Float[Array, "B T D"]) -> tuple[Queries, Keys, Keys]:
        config = self.config
        width, head_dim = config.embed_dim, config.head_dim
        joined_DKJH: Kernel | None = self.get_variable("params", _JOINED)
        if joined_DKJH is not None:
            heads_BTKJH = product("BTD,DKJH->BTKJH", x_BTD, joined_DKJH)
            q_BTNH = heads_BTKJH[..., :-2, :].reshape(*x_BTD.shape[:2], -1, head_dim)
            return q_BTNH, heads_BTKJH[..., -2, :], heads_BTKJH[..., -1, :]

        def project(name: str, heads: int, axis: str) -> Float[Array, "B T heads H"]:
            kernel_DNH = matrix(self, name, (width, heads, head_dim), ("embed", axis, "head_dim"))
            return product("BTD,DNH->BTNH", x_BTD, kernel_DNH)

        return (
            project("query", config.num_heads, "heads"),
            project("key", config.num_kv_heads, "kv_heads"),
            project("value", config.num_kv_heads, "kv_heads"),
        )


def for_decoding(attention: dict[str, Any]) -> dict[str, Any]:
    """Returns the matrices of a layer's attention in the layout for decoding (see `decoding.py`).

    One matrix replaces the query, key and value matrices. For each key head, the axis J of this
    matrix holds the G query heads, the key head and the value head. J is a new axis, so a mesh
    divides the other axes as before. The output matrix has one input axis Q = N * H instead of the
    axes N and H. The scales of a quantized matrix have as many axes as the matrix, so the same
    functions reshape the scales.
    """

    def join(query_DNH: jax.Array, key_DKH: jax.Array, value_DKH: jax.Array) -> jax.Array:
        width, kv_heads, head_dim = key_DKH.shape
        query_DKGH = query_DNH.reshape(width, kv_heads, -1, head_dim)
        return jnp.concatenate([query_DKGH, key_DKH[:, :, None], value_DKH[:, :, None]], axis=2)

    others = dict(attention)
    parts = [others.pop(name) for name in ("query", "key", "value")]
    flat_QD = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), others.pop("output"))
    return {**others, _JOINED: jax.tree.map(join, *parts), _FLAT_OUTPUT: flat_QD}


def attend_within(
    config: ModelConfig,
    segments_BT: Int[Array, "B T"] | None,
    mask_BTS: Bool[Array, "#B T S"] | None = None,
) -> Attend:
    """Returns an `Attend` in which the given tokens see only each other, without a cache.

    If `model.attention` is still `auto`, the function uses `xla`, because plain JAX runs on every
    device. `segments_BT` is the document of each token; None means one document per row. `mask_BTS`
    replaces the causal mask and the segments. No attention kernel accepts `mask_BTS`.
    """
    uses_kernel = config.attention not in ("auto", "xla")
    assert mask_BTS is None or not uses_kernel, f"a mask for {config.attention}"

    def attend(
        q_BTNH: Queries, k_BTKH: Keys, v_BTKH: Keys, products: AttentionProducts
    ) -> tuple[Queries, None]:
        # A cache may hold rounded keys and values. This line rounds in the same way, so a text gets
        # equal scores with and without a cache.
        k_BTKH, v_BTKH = products.rounded(k_BTKH), products.rounded(v_BTKH)
        if mask_BTS is not None or not products.fast_attention:
            mask = causal_mask(q_BTNH.shape[1], segments_BT) if mask_BTS is None else mask_BTS
            return attend_by_token(q_BTNH, k_BTKH, v_BTKH, mask, products), None
        if uses_kernel:
            return self_attention(config.attention, q_BTNH, k_BTKH, v_BTKH, segments_BT), None
        return causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT), None

    return attend
