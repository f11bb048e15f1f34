"""Perplexity of a text, in the paper's windows or in overlapping windows.

The text gets one BOS in front and is cut into windows of T = `model.max_seq_len` tokens. Without a
stride, windows do not overlap, as in the paper's evaluation script. Each window scores T - 1 tokens
because its first token has no context, and the rest after the last full window is dropped.

With a stride, windows overlap and every token of the text is scored once. A window reads T tokens
and scores the last `stride` of the tokens that follow them. The first window scores all T, and the
last window scores the rest of the text. Each scored token has a context of at least T - stride
tokens, or of all tokens before it.

The loss is the mean over all scored tokens, and perplexity = exp(loss). Bits per byte are
loss * tokens / (ln 2 * bytes of the scored tokens). They compare models with different tokenizers.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.scoring import log_softmax
from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.model.transformer import Params, Transformer, head_matrix
from mobilellm_jax.train.loss import token_losses

_BATCH_TOKENS = 8192  # per batch; attention scores of a 125M model take 1.2 GB at T = 2048
_LOSS_CHUNK = 256  # positions of each window with logits in memory at the same time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """How well a model predicts a text."""

    loss: float  # nats per scored token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # over the bytes of the scored tokens
    tokens: int  # scored tokens
    windows: int


def perplexity(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
) -> PerplexityResult:
    """Scores `text` and shows progress on a terminal.

    Args:
      config: the architecture.
      params: the parameters.
      tokenizer: the tokenizer that the model was trained with.
      text: at least one window; with a stride, at least one token.
      stride: number of tokens that each window scores. None: the paper's windows.
      batch_size: windows per batch; affects only speed and memory. None: windows of 8192 tokens.

    Raises:
      UserError: if the text is too short, or the stride is longer than a window.
      FloatingPointError: if the loss is not finite.
    """
    length = config.max_seq_len
    ids, windows = _cut(tokenizer, text, length, stride)
    longest = max(window.stop - window.start for window in windows)
    batch = min(batch_size or max(1, _BATCH_TOKENS // length), len(windows))
    params = jax.device_put(params)  # otherwise each batch would copy them from the host
    total = 0.0  # float64, because a float32 sum would lose digits over a long text
    for start in tqdm(range(0, len(windows), batch), unit="batch", disable=None):
        part = windows[start : start + batch]
        # The last batch and a short window keep the shape, so that nothing is compiled again.
        tokens_BT, targets_BT = np.zeros((2, batch, longest), np.int32)
        is_scored_BT = np.zeros((batch, longest), bool)
        for b, window in enumerate(part):
            here = slice(0, window.stop - window.start)
            tokens_BT[b, here] = ids[window.start : window.stop]
            targets_BT[b, here] = ids[window.start + 1 : window.stop + 1]
            is_scored_BT[b, window.scored - window.start : here.stop] = True
        losses_BT = np.asarray(_losses(params, tokens_BT, targets_BT, config))
        total += float(losses_BT.sum(dtype=np.float64, where=is_scored_BT))
    return _result(total, tokenizer, text, ids, windows)


def runtime_perplexity(
    runtime: Runtime, tokenizer: Tokenizer, text: str, *, stride: int | None = None
) -> PerplexityResult:
    """Scores `text` with an exported model in its own runtime; `perplexity` has the details."""
    ids, windows = _cut(tokenizer, text, runtime.max_seq_len, stride)
    total = 0.0
    for window in tqdm(windows, unit="window", disable=None):
        log_TV = log_softmax(runtime.read(ids[window.start : window.stop].tolist()))
        scored = range(window.scored - window.start, window.stop - window.start)
        total -= math.fsum(log_TV[scored, ids[window.scored + 1 : window.stop + 1]].tolist())
    return _result(total, tokenizer, text, ids, windows)


def _cut(
    tokenizer: Tokenizer, text: str, length: int, stride: int | None
) -> tuple[np.ndarray, list["Window"]]:
    """Returns the token ids, which begin with BOS, and the windows over them."""
    ids = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    return ids, _windows(length, ids) if stride is None else strided(length, ids, stride)


def _result(
    total: float, tokenizer: Tokenizer, text: str, ids: np.ndarray, windows: list["Window"]
) -> PerplexityResult:
    """Returns the result for a loss of `total` nats over all scored tokens."""
    if not math.isfinite(total):
        raise FloatingPointError(
            f"The loss of the text is {total}; the parameters are not finite, or too large."
        )
    scored = np.zeros(len(ids), bool)
    for window in windows:
        scored[window.scored + 1 : window.stop + 1] = True
    scored_bytes = len(text.encode("utf-8")) - sum(_byte_lengths(tokenizer, ids[~scored].tolist()))
    tokens = int(scored.sum())
    loss = total / tokens
    return PerplexityResult(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=total / math.log(2) / scored_bytes,
        tokens=tokens,
        windows=len(windows),
    )


class Window(NamedTuple):
    """The model reads tokens `start` to `stop` - 1; tokens `scored` + 1 to `stop` are scored."""

    start: int
    scored: int
    stop: int


def _windows(length: int, ids: np.ndarray) -> list[Window]:
    """Returns the paper's windows of `length` tokens; the last token is only a target."""
    if length < 2:
        raise UserError(
            f"model.max_seq_len={length} must be at least 2 to score a text, because the first "
            "token of a window is not scored."
        )
    count = len(ids) // length
    if count == 0:
        raise UserError(
            f"The text has {len(ids)} tokens with BOS and must have at least "
            f"model.max_seq_len={length} tokens; give a longer text, or use --stride, which "
            "accepts every length."
        )
    starts = range(0, count * length, length)
    return [Window(start, start, start + length - 1) for start in starts]


def strided(length: int, ids: np.ndarray, stride: int) -> list[Window]:
    """Returns windows of at most `length` tokens that together score every token except BOS.

    Raises:
      UserError: if the stride is longer than a window, or the text has no token.
    """
    if not 1 <= stride <= length:
        raise UserError(
            f"--stride={stride} must be at least 1 and at most model.max_seq_len={length}."
        )
    last = len(ids) - 1  # the last token is only a target
    if last < 1:
        raise UserError("The text is empty; give a text with at least one token.")
    windows = [Window(0, 0, min(length, last))]
    while windows[-1].stop < last:
        scored = windows[-1].stop
        stop = min(scored + stride, last)
        windows.append(Window(stop - length, scored, stop))
    return windows


@functools.partial(jax.jit, static_argnames="config")
def _losses(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    config: ModelConfig,
) -> Float[Array, "B T"]:
    """Returns the cross-entropy of the token after each position, in nats, as float32."""
    model = Transformer(config).bind({"params": params})
    x_BTD = model.hidden(tokens_BT)
    return token_losses(x_BTD, head_matrix(params, config), targets_BT, _LOSS_CHUNK)


def _byte_lengths(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Returns the number of UTF-8 bytes of each token inside a text.

    The number is exact for SentencePiece. If a token of a byte-level BPE ends in an unfinished
    character, the unfinished part counts as one byte, though it may have two or three.
    """
    # Each token is decoded behind another token, because decoding strips the first token's space.
    before = tokenizer.encode("a")[-1]
    start = len(tokenizer.decode([before]))
    texts = {i: tokenizer.decode([before, i])[start:] for i in set(ids)}
    # A byte that is not a whole character is decoded to U+FFFD, which has three bytes.
    return [
        len(texts[i].encode("utf-8")) - 2 * texts[i].count("\N{REPLACEMENT CHARACTER}") for i in ids
    ]
