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

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
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
    max_new_tokens: int  # A row that draws no EOS ends after this many new tokens.
    sampling: Sampling = DEFAULT
    eos_id: int | None = None  # The token that ends a row; with None, no token ends a row.


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
    """Continues each prompt; returns the new tokens, without the prompt and without EOS.

    A greedy continuation depends only on its prompt. A sampled continuation also depends on the
    seed and on the index of its row in the batch. No row depends on the other rows.

    Raises:
      UserError: if a prompt is empty, or if a prompt and `max_new_tokens` together exceed
        `model.max_seq_len`.
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
    ended = [False] * len(request.prompts)
    for new_BT in _chunks(config, params, request, chunk):
        parts: list[list[int]] = []
        for b, drawn in enumerate(new_BT.tolist()):
            ids: list[int] = [] if ended[b] else drawn
            if request.eos_id in ids:
                ended[b] = True
                ids = ids[: ids.index(request.eos_id)]
            parts.append(ids)
        yield parts


@struct.dataclass
class _State:
    cache: AlignedCache
    token_B: Int[Array, "B"]  # The last drawn tokens; the cache does not contain them yet.
    done_B: Bool[Array, "B"]
    drawn: Int[Array, ""]  # Number of drawn tokens per row.


def _chunks(
    config: ModelConfig, params: Params | Prepared, request: Request, chunk: int
) -> Iterator[np.ndarray]:
    """Yields arrays of drawn tokens [prompts, up to `chunk`] until every row has drawn EOS.

    A row may contain more tokens after its EOS.
    """
    prompts = request.prompts
    if not prompts:
        return
    _check_lengths(config, request)
    count = len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    prepared = params if isinstance(params, Prepared) else prepare(config, params)
    batch, width = _rows(config, prepared.weights, count), _bucket(max(lengths))
    tokens_BT = np.zeros((batch, width), np.int32)
    lengths_B = np.ones((batch,), np.int32)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, : lengths[b]] = prompt
        lengths_B[b] = lengths[b]
    stop = np.int32(-1 if request.eos_id is None else request.eos_id)  # No token has the id -1.
    done_B = np.arange(batch) >= count  # The rows after `count` are padding.
    draw = draw_of(request.sampling, config.vocab_size, batch)
    capacity = _bucket(max(lengths) + request.max_new_tokens)
    reading = prepared.params, tokens_BT, lengths_B, done_B, stop, draw
    state = _prefill(*reading, config=config, capacity=capacity)
    yield np.asarray(state.token_B)[:count, None]
    left = request.max_new_tokens - 1
    while left and not np.asarray(state.done_B).all():
        steps = min(chunk, left)
        state, new_BT = _decode(prepared.weights, state, np.int32(steps), stop, draw, config=config)
        yield np.asarray(new_BT)[:count, :steps]
        left -= steps


def _check_lengths(config: ModelConfig, request: Request) -> None:
    prompts, max_new_tokens = request.prompts, request.max_new_tokens
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not all(prompts):
        raise UserError("A prompt must have at least one token; start it with BOS.")
    limit, longest = config.max_seq_len, max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > limit:
        room = limit - longest
        remedy = "shorten the prompt" + (f", or ask for at most {room} new tokens" * (room > 0))
        raise UserError(
            f"A prompt of {longest} tokens (BOS included) and max_new_tokens={max_new_tokens} "
            f"exceed model.max_seq_len={limit}; {remedy}."
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
    stop: Int[Array, ""],
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
        done_B=done_B | (token_B == stop),
        drawn=drawn + 1,
    )


# The cache is by far the largest array here. It is donated, so the loop updates it in place.
@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _decode(
    weights: DecodingWeights,
    state: _State,
    steps: Int[Array, ""],
    stop: Int[Array, ""],
    draw: Draw,
    *,
    config: ModelConfig,
) -> tuple[_State, Int[Array, "B T"]]:
    """Draws up to `steps` more tokens per row; returns the new state and the tokens.

    The loop ends early if all rows are done. Columns without drawn tokens contain `stop`.
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
            done_B=state.done_B | (token_B == stop),
            drawn=state.drawn + 1,
        )
        return state, new_BT

    buffer_BT = jnp.full((state.token_B.shape[0], _CHUNK), stop, jnp.int32)
    return jax.lax.while_loop(unfinished, one_token, (state, buffer_BT))
