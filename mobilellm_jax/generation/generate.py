"""Text from a model: prefill, then decoding with a KV cache, one compiled loop per chunk of tokens.

Prompts of different lengths share a batch: they are padded on the right, read at once (prefill),
and the cache is shifted so that all rows end at the same place. From then on the device draws a
token, appends it and goes on without the host; the host hears of it once per chunk. Shapes are
rounded up to powers of two, so that a session of many prompts compiles a handful of programs.

A block that is applied R times (layer sharing, paper Sec. 2.5) has R slots in the cache, so cached
decoding equals the full forward pass for every sharing order.
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
from mobilellm_jax.generation.sampling import (
    DEFAULT,
    Draw,
    Method,
    Sampling,
    as_arrays,
    method_of,
    next_token,
)
from mobilellm_jax.model.cache import AlignedCache, align, init_cache
from mobilellm_jax.model.decoding import DecodingWeights, decode, decoding_weights, in_8_bits
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.products import narrowed
from mobilellm_jax.model.quantized import Kernel, QuantizedKernel
from mobilellm_jax.model.transformer import Params, Transformer

_CHUNK = 64  # tokens per host round trip when nobody watches; also the loop's output buffer
_STREAM_CHUNK = 8  # the same while text is shown as it comes
_SMALLEST_BUCKET = 64  # tokens; compiling another program takes longer than so much padding


@struct.dataclass
class Prepared:
    """Parameters ready for generating: cast, and laid out for decoding."""

    params: Params  # stacked, for the prefill
    weights: DecodingWeights


def prepare(config: ModelConfig, params: Params) -> Prepared:
    """Returns what every function here may be given instead of `params`.

    They prepare parameters at every call otherwise, and let go of them at its end. It is a copy of
    the parameters in the compute dtype (two if that is not float32): in training, no more than the
    gradients, which are not there between steps.
    """
    return Prepared(
        params=_to_compute_dtype(params, config), weights=decoding_weights(params, config)
    )


def generate(
    config: ModelConfig,
    params: Params | Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt: without the prompt, up to and without `eos_id`.

    A greedy row depends on its own prompt only, and a sampled one on (its prompt, seed, its place
    in the batch), not on its neighbours.

    Args:
      config: the architecture.
      params: its parameters, on any device, or what `prepare` made of them.
      prompts: token ids, each with at least BOS.
      max_new_tokens: at which a row ends that met no `eos_id`.
      sampling: how tokens are drawn.
      eos_id: the token that ends a row. None: none does.

    Raises:
      UserError: for an empty prompt, or one that with `max_new_tokens` exceeds
        `model.max_seq_len`.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for parts in _parts(config, params, prompts, max_new_tokens, sampling, eos_id, _CHUNK):
        for row, part in zip(rows, parts, strict=True):
            row.extend(part)
    return rows


def stream_batch(
    config: ModelConfig,
    params: Params | Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
    eos_id: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the tokens that `generate` returns, a few of every prompt's at a time.

    Whoever has seen enough stops asking, and no more are computed.
    """
    yield from _parts(config, params, prompts, max_new_tokens, sampling, eos_id, _STREAM_CHUNK)


def stream(
    config: ModelConfig,
    params: Params | Prepared,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
    eos_id: int | None = None,
) -> Iterator[list[int]]:
    """Yields the tokens that `generate` returns for one prompt, a few at a time."""
    for [part] in stream_batch(
        *(config, params, [prompt]),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=eos_id,
    ):
        yield part


@struct.dataclass
class _State:
    """Where every row of a batch stands."""

    cache: AlignedCache
    token_B: Int[Array, "B"]  # drawn last, not yet in the cache
    done_B: Bool[Array, "B"]
    drawn: Int[Array, ""]  # tokens per row so far


def _parts(
    config: ModelConfig,
    params: Params | Prepared,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    chunk: int,
) -> Iterator[list[list[int]]]:
    """Yields each prompt's new tokens, about `chunk` at a time, up to and without `eos_id`."""
    ended = [False] * len(prompts)
    for new_BT in _chunks(config, params, prompts, max_new_tokens, sampling, eos_id, chunk):
        parts: list[list[int]] = []
        for b, drawn in enumerate(new_BT.tolist()):
            ids: list[int] = [] if ended[b] else drawn
            if eos_id in ids:
                ended[b] = True
                ids = ids[: ids.index(eos_id)]
            parts.append(ids)
        yield parts


def _chunks(
    config: ModelConfig,
    params: Params | Prepared,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    chunk: int,
) -> Iterator[np.ndarray]:
    """Yields the drawn tokens, a column each, until every row is done; rows run on past EOS."""
    if not prompts:
        return
    _check_lengths(config, prompts, max_new_tokens)
    count = len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    prepared = params if isinstance(params, Prepared) else prepare(config, params)
    batch, width = _rows(config, prepared.weights, count), _bucket(max(lengths))
    tokens_BT = np.zeros((batch, width), np.int32)
    lengths_B = np.ones((batch,), np.int32)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, : lengths[b]] = prompt
        lengths_B[b] = lengths[b]
    stop = np.int32(-1 if eos_id is None else eos_id)  # no token is -1
    done_B = np.arange(batch) >= count  # rows that only fill the batch
    draw = as_arrays(sampling, config.vocab_size, batch)
    method = method_of(sampling)
    capacity = _bucket(max(lengths) + max_new_tokens)
    state = _prefill(
        *(prepared.params, tokens_BT, lengths_B, done_B, stop, draw),
        config=config,
        capacity=capacity,
        method=method,
    )
    yield np.asarray(state.token_B)[:count, None]
    left = max_new_tokens - 1
    while left and not np.asarray(state.done_B).all():
        steps = min(chunk, left)
        state, new_BT = _decode(
            prepared.weights, state, np.int32(steps), stop, draw, config=config, method=method
        )
        yield np.asarray(new_BT)[:count, :steps]
        left -= steps


def _check_lengths(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not all(prompts):
        raise UserError("A prompt of no tokens has nothing to continue; start it with BOS.")
    limit, longest = config.max_seq_len, max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > limit:
        room = limit - longest
        remedy = "shorten the prompt" + (f", or ask for at most {room} new tokens" * (room > 0))
        raise UserError(
            f"A prompt of {longest} tokens (BOS included) and max_new_tokens={max_new_tokens} "
            f"exceed model.max_seq_len={limit}; {remedy}."
        )


def _rows(config: ModelConfig, weights: DecodingWeights, count: int) -> int:
    """Returns how many rows the batch has; those past `count` are done from the start."""
    rows = _power_of_two(count)
    # XLA's CPU backend has no product of a vector and a matrix of bfloat16 or int8: it converts the
    # matrix to float32 or int32 at every token, which takes longer than a second row.
    down_FD = weights.blocks[0].down_FD
    in_integers = isinstance(down_FD, QuantizedKernel) and down_FD.integer_products
    converted = in_integers or compute_dtype(config) == jnp.bfloat16
    return max(rows, 2) if converted and jax.default_backend() == "cpu" else rows


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _bucket(tokens: int) -> int:
    return max(_SMALLEST_BUCKET, _power_of_two(tokens))


@functools.partial(jax.jit, static_argnames="config")
def _to_compute_dtype(params: Params, config: ModelConfig) -> Params:
    """Casts every matrix once instead of at every token; the model would cast it to the same.

    Norm scales stay float32, since they are multiplied in float32, and integers integers.
    """

    def cast(path: tuple[jax.tree_util.DictKey, ...], leaf: Kernel) -> Kernel:
        return leaf if path[-1].key == "scale" else narrowed(leaf, compute_dtype(config))

    return jax.tree_util.tree_map_with_path(  # type: ignore[no-any-return]  # untyped
        cast, params, is_leaf=lambda node: isinstance(node, QuantizedKernel)
    )


@functools.partial(jax.jit, static_argnames=("config", "capacity", "method"))
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
    method: Method,
) -> _State:
    """Reads the prompts, padded on the right, and draws the first token of each row."""
    model, batch = Transformer(config).bind({"params": params}), tokens_BT.shape[0]
    cache_dtype = jnp.int8 if in_8_bits(params).cache else compute_dtype(config)
    cache = init_cache(config, batch, capacity, cache_dtype)
    x_BTD, cache = model.extend(tokens_BT, cache)
    last_B1D = x_BTD[jnp.arange(batch)[:, None], lengths_B[:, None] - 1]
    logits_B1V = model.logits(last_B1D)
    drawn = jnp.zeros((), jnp.int32)
    token_B = next_token(logits_B1V[:, 0], draw, drawn, method)
    # The padding's keys lie past the true length: not part of the row.
    cache = dataclasses.replace(cache, length_B=lengths_B)
    return _State(
        cache=align(cache),
        token_B=token_B,
        done_B=done_B | (token_B == stop),
        drawn=drawn + 1,
    )


# The cache is by far the largest array here; donated, the loop updates it in place.
@functools.partial(jax.jit, static_argnames=("config", "method"), donate_argnames="state")
def _decode(
    weights: DecodingWeights,
    state: _State,
    steps: Int[Array, ""],
    stop: Int[Array, ""],
    draw: Draw,
    *,
    config: ModelConfig,
    method: Method,
) -> tuple[_State, Int[Array, "B T"]]:
    """Draws up to `steps` tokens more per row, fewer if all rows are done.

    The columns of the second result past those are `stop`.
    """
    first = state.drawn

    def unfinished(carry: tuple[_State, jax.Array]) -> jax.Array:
        state, _ = carry
        return (state.drawn < first + steps) & ~jnp.all(state.done_B)

    def one_token(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, new_BT = carry
        logits_BV, cache = decode(config, weights, state.token_B, state.cache)
        token_B = next_token(logits_BV, draw, state.drawn, method)
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
