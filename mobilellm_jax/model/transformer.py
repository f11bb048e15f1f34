"""The whole decoder: embed, apply the blocks, norm, and score the vocabulary.

Three ways through it: `hidden` for training (the loss scores the vocabulary itself, in chunks),
`__call__` for logits of whole sequences, and `extend` for decoding with a cache.
"""

import dataclasses
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import AttentionContext, uses_kernel
from mobilellm_jax.model.block import Block
from mobilellm_jax.model.cache import KVCache
from mobilellm_jax.model.layer_sharing import apply_blocks
from mobilellm_jax.model.norm import RMSNorm
from mobilellm_jax.model.parameters import matrix
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.products import rows_of, scores
from mobilellm_jax.model.quantized import Kernel
from mobilellm_jax.model.rope import rotation

Params = dict[str, Any]
"""A nested dict of arrays, some of them perhaps quantized; the names are those of the modules."""


Table = TypeVar("Table", bound=Kernel)


class Embedding(nn.Module):
    """The token table; with embedding sharing (paper Sec. 2.3) also the head."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Kernel:
        shape = (self.config.vocab_size, self.config.embed_dim)
        return matrix(self, "table", shape, ("vocab", "embed"))


class Head(nn.Module):
    """The output matrix of a model with untied embeddings."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Kernel:
        shape = (self.config.embed_dim, self.config.vocab_size)
        return matrix(self, "kernel", shape, ("embed", "vocab"))


class Transformer(nn.Module):
    """A MobileLLM of any shape in `ModelConfig`."""

    config: ModelConfig

    def setup(self) -> None:
        self.embedding = Embedding(self.config)
        self.blocks = Block(self.config)
        self.final_norm = RMSNorm(self.config.norm_eps)
        if not self.config.tie_embeddings:
            self.head = Head(self.config)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits of the token after each position."""
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        mask_BTS: Bool[Array, "#B T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normed last hidden states, in the compute dtype.

        Args:
          tokens_BT: token ids.
          segments_BT: document of each token; a token attends within its own only. None: one.
          positions_BT: position for RoPE. None: 0, 1, 2, ...
          mask_BTS: instead of segments, which tokens each may attend to; not for kernels, which
            compute their masks. None: those before it in its segment.
        """
        config = self.config
        length = tokens_BT.shape[1]
        if positions_BT is None:
            positions_BT = jnp.arange(length, dtype=jnp.int32)[None, :]
        assert mask_BTS is None or not uses_kernel(config), f"a mask for {config.attention}"
        context = AttentionContext(
            rotation=rotation(positions_BT, config.head_dim, config.rope_theta),
            positions_BT=positions_BT,
            mask_BTS=mask_BTS,
            segments_BT=segments_BT,
        )
        x_BTD, _ = apply_blocks(self.blocks, config, self._embed(tokens_BT), context, None)
        return self.final_norm(x_BTD)

    def extend(
        self, tokens_BT: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T more tokens per row; prefill is T = prompt, decoding T = 1.

        The tokens of row b stand at positions `cache.length_B[b] + 0 ... T - 1`, which must fit
        the cache; the returned cache is T longer. A row that was padded on the right is taken
        back to its true length by replacing `length_B`.
        """
        config = self.config
        length, capacity = tokens_BT.shape[1], cache.capacity
        positions_BT = cache.length_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        keys_11S = jnp.arange(capacity, dtype=jnp.int32)[None, None, :]
        context = AttentionContext(
            rotation=rotation(positions_BT, config.head_dim, config.rope_theta),
            positions_BT=positions_BT,
            mask_BTS=keys_11S <= positions_BT[:, :, None],
        )
        x_BTD, extended = apply_blocks(self.blocks, config, self._embed(tokens_BT), context, cache)
        assert extended is not None, "a cache that goes in comes out"
        longer = dataclasses.replace(extended, length_B=cache.length_B + length)
        return self.final_norm(x_BTD), longer

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores the vocabulary, accumulating in float32; tied embeddings are not scaled."""
        head_DV = self.embedding().T if self.config.tie_embeddings else self.head()
        return scores("BTD,DV->BTV", x_BTD, head_DV)

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gathered over `fsdp` before the lookup: GSPMD would otherwise copy the result everywhere.
        table_VD = gathered(self.embedding())
        # Rows are converted after the lookup, so that the gradients of a token that occurs often
        # are summed in float32.
        x_BTD = rows_of(table_VD, tokens_BT).astype(compute_dtype(self.config))
        axes = ("batch", "length", "activation_embed")
        return cast(jax.Array, nn.with_logical_constraint(x_BTD, axes))


def head_matrix(params: Params, config: ModelConfig) -> Kernel:
    """Returns the matrix that scores the vocabulary, one row per token, from a parameter tree."""
    if config.tie_embeddings:
        return cast(Kernel, params["embedding"]["table"])
    return cast(Kernel, params["head"]["kernel"]).T


def gathered(table_VD: Table) -> Table:
    """Returns a table, or the parts of a quantized one, whole over `fsdp`."""
    axes = ("vocab", "activation_embed")
    return cast(Table, jax.tree.map(lambda x: nn.with_logical_constraint(x, axes), table_VD))


def init_boxed(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random parameter tree whose leaves carry their logical axes (flax boxes)."""
    tokens_11 = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(config, attention="xla")  # kernels take no sequence of one token
    return cast(Params, Transformer(config).init(key, tokens_11)["params"])


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random float32 parameter tree: matrices N(0, 0.02^2), norms 1."""
    return cast(Params, jax.jit(lambda k: nn.unbox(init_boxed(config, k)))(key))
