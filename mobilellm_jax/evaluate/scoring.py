"""Computes the log-likelihoods of many continuations from prefix trees, on any mesh.

The likelihood of a continuation is the product of the probabilities of its tokens. The probability
of a token is computed given the context and the earlier tokens of the continuation. A continuation
is greedy if each of its tokens is the likeliest token at its position.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import NotFiniteError
from mobilellm_jax.evaluate.prefix_trees import Batch, Query, grow_trees, make_batches, pack_rows
from mobilellm_jax.model.products import scores
from mobilellm_jax.model.transformer import Params, Transformer, head_matrix
from mobilellm_jax.sharding import (
    Rules,
    batch_shards,
    jit_under,
    local_rows,
    put_batch,
    replicated,
)
from mobilellm_jax.train.loss import chunks, unchunk

_SMALLEST_TREE = 256  # A tree may always have this many positions, even if max_seq_len is smaller.
_BATCH_TOKENS = {"cpu": 2048}  # Tokens per device in a batch, by platform.
_BATCH_TOKENS_ELSEWHERE = 16_384
_LOGITS_BYTES = 64 << 20  # Bytes of logits that a device holds at the same time.


class Score(NamedTuple):
    """The score of a continuation."""

    log_likelihood: float  # In nats.
    is_greedy: bool


class Scorer:
    """Scores queries with models of one architecture; new parameters need no compilation.

    Rows are split over the mesh axes `data` and `fsdp`. `batch_tokens` is the number of tokens per
    device in a batch; it affects only speed and memory.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, rules: Rules, *, batch_tokens: int | None = None
    ) -> None:
        # The attention kernels do not accept the mask of a tree; the XLA attention does.
        self.config = dataclasses.replace(config, attention="xla", remat="none")
        self._mesh = mesh
        platform = mesh.devices.flat[0].platform
        default = _BATCH_TOKENS.get(platform, _BATCH_TOKENS_ELSEWHERE)
        self._batch_tokens = (batch_tokens or default) * batch_shards(mesh)
        self._forward = jit_under(mesh, rules, self._score, out_shardings=replicated(mesh))

    def scores(self, params: Params, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        """Yields one list per batch; it holds pairs of the index and the score of a query.

        Raises:
          NotFiniteError: if a likelihood is not finite.
        """
        trees = grow_trees(queries, max(_SMALLEST_TREE, self.config.max_seq_len))
        # The size of the axis `sequence` must divide the row length T, and also the T / 8 targets.
        rows = pack_rows(trees, 8 * self._mesh.shape["sequence"])
        batches = make_batches(rows, self._batch_tokens, batch_shards(self._mesh))
        running: tuple[Batch, tuple[jax.Array, jax.Array]] | None = None
        for batch in batches:
            # The device computes this batch while the host reads the previous result.
            started = batch, self._forward(params, self._placed(batch))
            if running is not None:
                yield _read(*running)
            running = started
        if running is not None:
            yield _read(*running)

    def _placed(self, batch: Batch) -> dict[str, jax.Array]:
        count = batch.shape[0]
        own = local_rows(self._mesh, count)
        arrays = {name: array[own] for name, array in batch.arrays.items()}
        return put_batch(arrays, self._mesh, count)

    def _score(
        self, params: Params, batch: dict[str, Int[Array, "B _"]]
    ) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
        """Returns each target's float32 log-probability, and whether no token is likelier."""
        model = Transformer(self.config).bind({"params": params})
        ends_BT = batch.get("ends")
        mask_BTS = None
        if ends_BT is not None:
            place_T = jnp.arange(ends_BT.shape[1])
            is_before_TS = place_T[None, :] <= place_T[:, None]
            mask_BTS = is_before_TS[None] & (place_T[None, :, None] < ends_BT[:, None, :])
        x_BTD = model.hidden(
            batch["tokens"],
            segments_BT=batch.get("segments"),
            positions_BT=batch["positions"],
            mask_BTS=mask_BTS,
        )
        x_BSD = jnp.take_along_axis(x_BTD, batch["sources"][:, :, None], axis=1)
        head_VD = head_matrix(params, self.config).astype(x_BSD.dtype)
        rows, length = batch["targets"].shape
        logits_bytes = 4 * self.config.vocab_size * (rows // batch_shards(self._mesh))
        chunk = max(1, _LOGITS_BYTES // logits_bytes)

        def score(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_BCD, targets_BC = xs
            logits_BCV = scores("BCD,VD->BCV", x_BCD, head_VD)
            found_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)
            total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            return found_BC1[:, :, 0] - total_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

        log_nBC, greedy_nBC = jax.lax.map(
            score, (chunks(x_BSD, chunk), chunks(batch["targets"], chunk))
        )
        return unchunk(log_nBC, length), unchunk(greedy_nBC, length)


def _read(batch: Batch, arrays: tuple[jax.Array, jax.Array]) -> list[tuple[int, Score]]:
    log_BS, greedy_BS = (np.asarray(array) for array in arrays)
    found = []
    for query, row, start, stop in batch.spans:
        is_greedy = bool(greedy_BS[row, start:stop].all())
        found.append((query, checked_score(log_BS[row, start:stop].tolist(), is_greedy)))
    return found


def checked_score(log_probabilities: Sequence[float], is_greedy: bool) -> Score:
    """Adds up log-probabilities; raises a NotFiniteError if the sum is not finite."""
    log_likelihood = math.fsum(log_probabilities)
    if not math.isfinite(log_likelihood):
        raise NotFiniteError(
            f"The log-likelihood of a continuation is {log_likelihood}; the weights are not "
            "finite, or too large."
        )
    return Score(log_likelihood, is_greedy)
