"""Continues prompts: fills a KV cache (prefill), then decodes chunks of tokens in a compiled loop.

Prompts of different lengths share a batch. They are padded on the right, and the model reads all
prompts in one pass (prefill). The rows of the cache are then shifted so that all prompts end at the
same index. From then on, the device draws tokens in a loop without the host; the host reads them
once per chunk. Shapes are rounded up to powers of two, so a session of many prompts compiles only a
few programs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import NotFiniteError, UserError
from mobilellm_jax.generation.sampling import DEFAULT, Draw, Sampling, draw_of, next_token
from mobilellm_jax.model.cache import AlignedCache, align, init_cache
from mobilellm_jax.model.decoding import (
    DecodingWeights,
    decode,
    decoding_weights,
    in_compute_dtype,
)
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.products import SpecialKernel
from mobilellm_jax.model.softmax import ATTENTION_PRODUCTS, IN_FLOAT
from mobilellm_jax.model.transformer import Params, Transformer

_CHUNK = 64  # Tokens that the device draws before the host reads them; also the buffer size.
_STREAM_CHUNK = 8  # Tokens per chunk while a user watches the text.
_SMALLEST_BUCKET = 64  # In tokens. Padding to this size is faster than compiling one more program.


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and the settings for continuing them."""

    prompts: Sequence[Sequence[int]]  # Token ids; each prompt has at least one token.
    _: dataclasses.KW_ONLY
    # A text without EOS ends after this number of new tokens: one number for all, or one for each.
    max_new_tokens: int | Sequence[int]
    sampling: Sampling = DEFAULT
    end_ids: Sequence[int] = ()  # Each of these tokens ends a row.
    # The number of each text, in [0, 2^32). The seed and this number give the random key of the
    # text, so its place in the batch has no effect. With None, the numbers are 0, 1, 2 ...
    streams: Sequence[int] | None = None

    @property
    def limits(self) -> list[int]:
        """The largest number of new tokens of each text."""
        limit = self.max_new_tokens
        return [limit] * len(self.prompts) if isinstance(limit, int) else list(limit)


@struct.dataclass
class Prepared:
    """Parameters in the compute dtype, in one layout for prefill and one for decoding."""

    params: Params  # In the layout of the checkpoint, for prefill.
    weights: DecodingWeights


def prepare(config: ModelConfig, params: Params) -> Prepared:
    """Prepares `params` once for many calls of `generate` and `stream`.

    If `generate` or `stream` gets plain parameters, the function prepares them at every call. The
    prepared form holds a copy of the parameters in the compute dtype, and a second copy if this
    dtype is not float32. During training, the copies fit into the memory of the gradients, which is
    free between steps.
    """
    narrow = in_compute_dtype(params, config)
    return Prepared(params=narrow, weights=decoding_weights(narrow, config))


def generate(config: ModelConfig, params: Params | Prepared, request: Request) -> list[list[int]]:
    """Continues each prompt; returns the new tokens, without the prompt and the token that ends it.

    A greedy continuation depends only on its prompt. A sampled continuation also depends on the
    seed and on its number in `Request.streams`. No row depends on the other rows.

    Raises:
      UserError: if a prompt is empty, or if a prompt and its `max_new_tokens` together exceed
        `model.max_seq_len`.
      NotFiniteError: if the model computes logits that are not finite.
    """
    rows: list[list[int]] = [[] for _ in request.prompts]
    for parts in stream(config, params, request, _CHUNK):
        for row, part in zip(rows, parts, strict=True):
            row.extend(part)
    return rows


def stream(
    config: ModelConfig, params: Params | Prepared, request: Request, chunk: int = _STREAM_CHUNK
) -> Iterator[list[list[int]]]:
    """Yields the tokens of `generate` in parts of about `chunk` tokens per prompt.

    If the caller stops the iteration, the device computes no further chunk.
    """
    left = request.limits  # The number of tokens that each row may still draw.
    for new_BT in _chunks(config, params, request, chunk):
        parts: list[list[int]] = []
        for b, drawn in enumerate(new_BT.tolist()):
            ids: list[int] = drawn[: left[b]]
            left[b] -= len(ids)
            if (end := _first_of(request.end_ids, ids)) is not None:
                left[b] = 0
                ids = ids[:end]
            parts.append(ids)
        yield parts


def _first_of(end_ids: Sequence[int], ids: Sequence[int]) -> int | None:
    return next((i for i, token in enumerate(ids) if token in end_ids), None)


@struct.dataclass
class _State:
    cache: AlignedCache
    token_B: Int[Array, "B"]  # The last drawn tokens; the cache does not contain them yet.
    done_B: Bool[Array, "B"]
    drawn: Int[Array, ""]  # Number of drawn tokens per row.
    lost_B: Bool[Array, "B"]  # Whether a row had logits that are not finite before it was done.


@struct.dataclass
class _Ends:
    """The conditions that end a row: it gets a token of `stop_S`, or it has `limit_B` tokens."""

    stop_S: Int[Array, "S"]
    limit_B: Int[Array, "B"]


class Shape(NamedTuple):
    """The sizes for which JAX compiles a program; requests of one shape share their programs."""

    rows: int  # Rows of the batch; the rows after the last prompt are padding.
    width: int  # Tokens of a prompt, with padding.
    capacity: int  # Tokens of a row of the cache.


def shape_of(config: ModelConfig, prepared: Prepared, request: Request) -> Shape:
    """Returns the sizes of the programs that serve a request with at least one prompt."""
    longest = max(map(len, request.prompts))
    rows = _rows(config, prepared.weights, len(request.prompts))
    return Shape(rows, _bucket(longest), _bucket(longest + max(request.limits)))


def new_tokens_for(
    config: ModelConfig, prompt: Sequence[int], wanted: int | None, most: int
) -> int:
    """Returns the limit of new tokens for a prompt: `wanted`, or if None, the room up to `most`.

    Raises:
      UserError: if a prompt is empty, or if the tokens do not fit into `model.max_seq_len`.
    """
    if not prompt:
        raise UserError("A prompt must have at least one token; start it with BOS.")
    limit, room = config.max_seq_len, config.max_seq_len - len(prompt)
    chosen = max(1, min(most, room)) if wanted is None else wanted
    if chosen < 1:
        raise UserError(f"max_new_tokens={chosen} must be at least 1.")
    if chosen > room:
        remedy = "shorten the prompt" + (f", or ask for at most {room} new tokens" * (room > 0))
        raise UserError(
            f"A prompt of {len(prompt)} tokens and max_new_tokens={chosen} "
            f"exceed model.max_seq_len={limit}; {remedy}."
        )
    return chosen


def _chunks(
    config: ModelConfig, params: Params | Prepared, request: Request, chunk: int
) -> Iterator[np.ndarray]:
    """Yields arrays of drawn tokens [prompts, up to `chunk`] until every row has drawn EOS.

    A row may contain more tokens after its EOS.
    """
    prompts = request.prompts
    if not prompts:
        return
    limits, count = request.limits, len(prompts)
    for prompt, limit in zip(prompts, limits, strict=True):
        new_tokens_for(config, prompt, limit, limit)
    prepared = params if isinstance(params, Prepared) else prepare(config, params)
    batch, width, capacity = shape_of(config, prepared, request)
    tokens_BT = np.zeros((batch, width), np.int32)
    lengths_B, limit_B = np.ones((2, batch), np.int32)
    streams_B = np.zeros(batch, np.uint32)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, : len(prompt)] = prompt
        lengths_B[b], limit_B[b] = len(prompt), limits[b]
        streams_B[b] = b if request.streams is None else request.streams[b]
    stop_S = np.asarray([*request.end_ids] or [-1], np.int32)  # No token has the id -1.
    ends = _Ends(jnp.asarray(stop_S), jnp.asarray(limit_B))
    done_B = np.arange(batch) >= count  # The rows after `count` are padding.
    draw = draw_of(request.sampling, config.vocab_size, streams_B)
    reading = prepared.params, tokens_BT, lengths_B, done_B, ends, draw
    state = _prefill(*reading, config=config, capacity=capacity)
    _check_finite(state)
    yield np.asarray(state.token_B)[:count, None]
    left = max(limits) - 1
    while left and not np.asarray(state.done_B).all():
        steps = min(chunk, left)
        state, new_BT = _decode(prepared.weights, state, np.int32(steps), ends, draw, config=config)
        _check_finite(state)
        yield np.asarray(new_BT)[:count, :steps]
        left -= steps


def _check_finite(state: _State) -> None:
    lost = np.flatnonzero(np.asarray(state.lost_B))
    if lost.size:
        raise NotFiniteError(
            f"The model computes logits that are not finite after prompt {lost[0] + 1} of the "
            "batch, so it cannot choose a token; the weights are not finite, or too large."
        )


def _rows(config: ModelConfig, weights: DecodingWeights, count: int) -> int:
    """Returns the number of rows of the batch, which includes padding rows after `count`."""
    rows = _power_of_two(count)
    # XLA's CPU backend cannot multiply a single vector by a bfloat16 or int8 matrix directly. It
    # converts the matrix to float32 or int32 at every token, which takes longer than computing a
    # second row.
    down_FD = weights.blocks[0]["feed_forward"]["down"]
    in_integers = isinstance(down_FD, SpecialKernel) and down_FD.integer_products
    converted = in_integers or compute_dtype(config) == jnp.bfloat16
    return max(rows, 2) if converted and jax.default_backend() == "cpu" else rows


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _bucket(tokens: int) -> int:
    return max(_SMALLEST_BUCKET, _power_of_two(tokens))


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _prefill(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    done_B: Bool[Array, "B"],
    ends: _Ends,
    draw: Draw,
    *,
    config: ModelConfig,
    capacity: int,
) -> _State:
    """Reads the prompts, which are padded on the right, and draws each row's first token."""
    model, batch = Transformer(config).bind({"params": params}), tokens_BT.shape[0]
    products = params["blocks"]["attention"].get(ATTENTION_PRODUCTS, IN_FLOAT)
    cache = init_cache(config, batch, capacity, compute_dtype(config), products)
    x_BTD, cache = model.extend(tokens_BT, cache)
    last_B1D = x_BTD[jnp.arange(batch)[:, None], lengths_B[:, None] - 1]
    logits_B1V = model.logits(last_B1D)
    drawn = jnp.zeros((), jnp.int32)
    token_B = next_token(logits_B1V[:, 0], draw, drawn)
    # The keys of padding tokens come last in a row, so the true length excludes them.
    cache = dataclasses.replace(cache, length_B=lengths_B)
    return _State(
        cache=align(cache),
        token_B=token_B,
        done_B=_done(done_B, token_B, drawn + 1, ends),
        drawn=drawn + 1,
        lost_B=_lost(logits_B1V[:, 0], done_B),
    )


# The cache is by far the largest array here. It is donated, so the loop updates it in place.
@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _decode(
    weights: DecodingWeights,
    state: _State,
    steps: Int[Array, ""],
    ends: _Ends,
    draw: Draw,
    *,
    config: ModelConfig,
) -> tuple[_State, Int[Array, "B T"]]:
    """Draws up to `steps` more tokens per row; returns the new state and the tokens.

    The loop ends early if all rows are done. Columns without drawn tokens contain an end token.
    """
    first = state.drawn

    def unfinished(carry: tuple[_State, jax.Array]) -> jax.Array:
        state, _ = carry
        return (state.drawn < first + steps) & ~jnp.all(state.done_B)

    def one_token(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, new_BT = carry
        logits_BV, cache = decode(config, weights, state.token_B, state.cache)
        token_B = next_token(logits_BV, draw, state.drawn)
        new_BT = new_BT.at[:, state.drawn - first].set(token_B)
        state = _State(
            cache=cache,
            token_B=token_B,
            done_B=_done(state.done_B, token_B, state.drawn + 1, ends),
            drawn=state.drawn + 1,
            lost_B=state.lost_B | _lost(logits_BV, state.done_B),
        )
        return state, new_BT

    buffer_BT = jnp.full((state.token_B.shape[0], _CHUNK), ends.stop_S[0], jnp.int32)
    return jax.lax.while_loop(unfinished, one_token, (state, buffer_BT))


def _done(
    done_B: Bool[Array, "B"], token_B: Int[Array, "B"], drawn: Int[Array, ""], ends: _Ends
) -> Bool[Array, "B"]:
    return done_B | jnp.isin(token_B, ends.stop_S) | (drawn >= ends.limit_B)


def _lost(logits_BV: Float[Array, "B V"], done_B: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """Returns which unfinished rows have NaN or infinity as their largest logit.

    The largest logit is NaN if any logit is NaN, so the other logits need no check.
    """
    return ~done_B & ~jnp.isfinite(jnp.max(logits_BV, axis=-1))
