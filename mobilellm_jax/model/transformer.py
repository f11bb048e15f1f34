"""The whole decoder: embeds tokens, applies the blocks and the last norm, computes logits.

The model has three entry points. `hidden` is for training, where the loss computes the logits in
chunks. `__call__` returns the logits of whole sequences. `extend` reads prompts into a cache.
`decoding.py` then applies the same blocks to one token at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.attention import Attend, attend_within
from mobilellm_jax.model.block import Block, RMSNorm
from mobilellm_jax.model.cache import KVCache, attend_with_cache
from mobilellm_jax.model.layer_sharing import apply_blocks
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.products import Kernel, matrix, scores
from mobilellm_jax.model.rope import rotation

Params = dict[str, Any]
"""A nested dict of arrays or of other kernels (`products.py`), keyed by the modules' names."""

Table = TypeVar("Table", bound=Kernel)


class VocabularyMatrix(nn.Module):
    """A matrix with a row or a column for every token."""

    config: ModelConfig
    parameter: str
    axes: tuple[str, str]  # Logical axes.

    @nn.compact
    def __call__(self) -> Kernel:
        sizes = {"vocab": self.config.vocab_size, "embed": self.config.embed_dim}
        return matrix(self, self.parameter, tuple(sizes[axis] for axis in self.axes), self.axes)


class Transformer(nn.Module):
    """A MobileLLM of any shape that `ModelConfig` allows."""

    config: ModelConfig

    def setup(self) -> None:
        # With tied embeddings (paper Sec. 2.3) the token table is also the output matrix.
        self.embedding = VocabularyMatrix(self.config, "table", ("vocab", "embed"))
        self.blocks = Block(self.config)
        self.final_norm = RMSNorm(self.config.norm_eps)
        if not self.config.tie_embeddings:
            self.head = VocabularyMatrix(self.config, "kernel", ("embed", "vocab"))

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
        """Returns the hidden states after the last norm, in the compute dtype.

        `segments_BT` is the document of each token, and a token attends only within its document.
        None means one document per row. `positions_BT` are for RoPE; None means 0, 1, 2, ...
        `mask_BTS` is True where a query may attend to a key. This mask replaces the causal mask and
        the segments. No attention kernel accepts `mask_BTS`.
        """
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        attend = attend_within(self.config, segments_BT, mask_BTS)
        x_BTD, _ = self._apply(tokens_BT, positions_BT, lambda memory, slot: attend)
        return x_BTD

    def extend(
        self, tokens_BT: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T more tokens per row; returns their hidden states and the extended cache.

        The tokens of row b get the positions `cache.length_B[b] + 0 ... T - 1`, which must fit into
        the cache. If the caller padded a row on the right, it must then set `length_B` of this row
        back to the true length.
        """
        length = tokens_BT.shape[1]
        positions_BT = cache.length_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        keys_11S = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, :]
        mask_BTS = keys_11S <= positions_BT[:, :, None]

        def attend_in_slot(cache: KVCache, slot: Int[Array, ""]) -> Attend:
            return attend_with_cache(cache, slot, positions_BT, mask_BTS)

        x_BTD, extended = self._apply(tokens_BT, positions_BT, attend_in_slot, cache)
        return x_BTD, dataclasses.replace(extended, length_B=cache.length_B + length)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits in float32; does not scale tied embeddings."""
        head_DV = self.embedding().T if self.config.tie_embeddings else self.head()
        return scores("BTD,DV->BTV", x_BTD, head_DV)

    def _apply(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "#B T"],
        attend_in_slot: Callable[[Any, Int[Array, ""]], Attend],
        memory: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        config = self.config
        turn = rotation(positions_BT, config)
        x_BTD = self._embed(tokens_BT)
        x_BTD, memory = apply_blocks(self.blocks, config, x_BTD, turn, attend_in_slot, memory)
        return self.final_norm(x_BTD), memory

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # The devices gather the table over `fsdp` before the lookup. Otherwise the compiler (GSPMD)
        # would copy the looked-up rows to every device.
        table_VD = gathered(self.embedding())
        # The rows are looked up in the float32 table and then converted, so that the gradients of a
        # frequent token are summed in float32.
        x_BTD = table_VD[tokens_BT].astype(compute_dtype(self.config))
        axes = ("batch", "length", "activation_embed")
        return cast(jax.Array, nn.with_logical_constraint(x_BTD, axes))


def head_matrix(params: Params, config: ModelConfig) -> Kernel:
    """Returns the output matrix of a parameter tree, with one row per token."""
    if config.tie_embeddings:
        return cast(Kernel, params["embedding"]["table"])
    return cast(Kernel, params["head"]["kernel"]).T


def gathered(table_VD: Table) -> Table:
    """Returns an embedding table or head whose arrays are not split over the mesh axis `fsdp`."""
    axes = ("vocab", "activation_embed")
    return cast(Table, jax.tree.map(lambda x: nn.with_logical_constraint(x, axes), table_VD))


def init_boxed(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random parameter tree whose leaves carry their logical axes (flax boxes)."""
    tokens_11 = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(config, attention="xla")  # Kernels take no sequence of one token.
    return cast(Params, Transformer(config).init(key, tokens_11)["params"])


@functools.lru_cache(maxsize=64)
def boxed_shapes(config: ModelConfig) -> Params:
    """Returns the shapes and types of `init_boxed`, with the logical axes.

    A process traces each config once, because the trace takes a third of a second.
    """
    return cast(Params, jax.eval_shape(lambda: init_boxed(config, jax.random.key(0))))


def param_shapes(config: ModelConfig) -> Params:
    """Returns the shapes and types of `init_params`, without computing or allocating anything."""
    return cast(Params, nn.unbox(boxed_shapes(config)))


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns a random float32 parameter tree: matrices N(0, model.init_std^2), norms 1."""
    return cast(Params, jax.jit(lambda k: nn.unbox(init_boxed(config, k)))(key))
