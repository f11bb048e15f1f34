"""The whole decoder: it embeds tokens, applies the blocks, norms, and scores the vocabulary.

The model has three entry points. `hidden` serves training, where the loss scores the vocabulary
itself, in chunks. `__call__` returns the logits of whole sequences. `extend` reads prompts into a
cache. `decoding.py` then applies the same blocks to one token at a time.
"""

import dataclasses
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attend, attend_within, uses_kernel
from mobilellm_jax.model.block import Block
from mobilellm_jax.model.cache import KVCache, attend_with_cache
from mobilellm_jax.model.layer_sharing import apply_blocks
from mobilellm_jax.model.norm import RMSNorm
from mobilellm_jax.model.parameters import matrix
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.products import Kernel, scores
from mobilellm_jax.model.rope import rotation

Params = dict[str, Any]
"""A nested dict of arrays or of other kernels (`products.py`), keyed by the modules' names."""

Table = TypeVar("Table", bound=Kernel)


class Embedding(nn.Module):
    """The token table; with tied embeddings (paper Sec. 2.3) it is the output matrix too."""

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
    """A MobileLLM of any shape that `ModelConfig` allows."""

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
        """Returns the float32 logits of the token after each position."""
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
          segments_BT: the document of each token. A token attends only within its document. None
            means that each row is one document.
          positions_BT: the positions for RoPE. None means 0, 1, 2, ...
          mask_BTS: True where a query may attend to a key. It replaces the causal mask and the
            segments. Attention kernels compute their own masks, so they do not take one.
        """
        config = self.config
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        assert mask_BTS is None or not uses_kernel(config), f"a mask for {config.attention}"
        attend = attend_within(config, segments_BT, mask_BTS)

        def attend_in_slot(cache: KVCache | None, slot: Int[Array, ""]) -> Attend:
            return attend

        turn = rotation(positions_BT, config.head_dim, config.rope_theta)
        embedded_BTD = self._embed(tokens_BT)
        x_BTD, _ = apply_blocks(self.blocks, config, embedded_BTD, turn, attend_in_slot, None)
        return self.final_norm(x_BTD)

    def extend(
        self, tokens_BT: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T more tokens per row; returns their hidden states and the longer cache.

        The tokens of row b get the positions `cache.length_B[b] + 0 ... T - 1`, which must fit into
        the cache. If a row was padded on the right, the caller sets its `length_B` back to the true
        length afterwards.
        """
        config = self.config
        length = tokens_BT.shape[1]
        positions_BT = cache.length_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        keys_11S = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, :]
        mask_BTS = keys_11S <= positions_BT[:, :, None]

        def attend_in_slot(cache: KVCache | None, slot: Int[Array, ""]) -> Attend:
            assert cache is not None, "the scan carries the cache that it was given"
            return attend_with_cache(cache, slot, positions_BT, mask_BTS)

        turn = rotation(positions_BT, config.head_dim, config.rope_theta)
        embedded_BTD = self._embed(tokens_BT)
        x_BTD, extended = apply_blocks(
            self.blocks, config, embedded_BTD, turn, attend_in_slot, cache
        )
        assert extended is not None, "the scan returns the cache that it was given"
        longer = dataclasses.replace(extended, length_B=cache.length_B + length)
        return self.final_norm(x_BTD), longer

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores the vocabulary with float32 sums; tied embeddings are not scaled."""
        head_DV = self.embedding().T if self.config.tie_embeddings else self.head()
        return scores("BTD,DV->BTV", x_BTD, head_DV)

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # The table is gathered over `fsdp` before the lookup. Otherwise GSPMD would copy the result
        # to every device.
        table_VD = gathered(self.embedding())
        # The rows are converted after the lookup. So the gradients of a frequent token are summed
        # in float32.
        x_BTD = table_VD[tokens_BT].astype(compute_dtype(self.config))
        axes = ("batch", "length", "activation_embed")
        return cast(jax.Array, nn.with_logical_constraint(x_BTD, axes))


def head_matrix(params: Params, config: ModelConfig) -> Kernel:
    """Returns the output matrix of a parameter tree, with one row per token."""
    if config.tie_embeddings:
        return cast(Kernel, params["embedding"]["table"])
    return cast(Kernel, params["head"]["kernel"]).T


def gathered(table_VD: Table) -> Table:
    """Returns a table whose arrays are whole over `fsdp`."""
    axes = ("vocab", "activation_embed")
    return cast(Table, jax.tree.map(lambda x: nn.with_logical_constraint(x, axes), table_VD))


def init_boxed(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random parameter tree whose leaves carry their logical axes (flax boxes)."""
    tokens_11 = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(config, attention="xla")  # kernels take no sequence of one token
    return cast(Params, Transformer(config).init(key, tokens_11)["params"])


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random float32 parameter tree: matrices N(0, model.init_std^2), norms 1."""
    return cast(Params, jax.jit(lambda k: nn.unbox(init_boxed(config, k)))(key))
