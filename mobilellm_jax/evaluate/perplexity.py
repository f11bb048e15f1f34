"""Perplexity of a text, as the paper's evaluation script measures it, or of every token of it.

The text, behind one BOS, is cut into windows of the model's length T, without overlap; the first
token of a window predicts the second, and so on, so that each scores T - 1 tokens; what is left
after the last full window is dropped. With a stride, windows overlap: each reads T tokens and
scores the last `stride` of those that follow them, the first window all T, the last one what is
left. So every token of the text is scored once, after T - stride tokens at least, or all there are.

The loss is the mean over all scored tokens, and perplexity = exp(loss). Bits per byte,
loss * tokens / (ln 2 * bytes of text that the scored tokens stand for), compares models with
different tokenizers.
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

_BATCH_TOKENS = 8192  # at once; attention scores of a 125M model then take 1.2 GB at T = 2048
_LOSS_CHUNK = 256  # positions of each window whose logits exist at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """What a text costs a model."""

    loss: float  # nats per scored token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # over the bytes of the scored tokens
    tokens: int  # scored
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
    """Scores `text` in windows of `model.max_seq_len` tokens; shows progress on a terminal.

    Args:
      config: the architecture.
      params: its parameters.
      tokenizer: the one it was trained with.
      text: at least a window long; with a stride, at least a token.
      stride: see the module's docstring. None: the paper's windows.
      batch_size: windows at once; changes nothing but speed and memory. None: 8192 tokens' worth.

    Raises:
      UserError: if the text is too short, or the stride not within a window.
      FloatingPointError: if the model gives no finite loss.
    """
    length = config.max_seq_len
    ids, windows = _cut(tokenizer, text, length, stride)
    longest = max(window.stop - window.start for window in windows)
    batch = min(batch_size or max(1, _BATCH_TOKENS // length), len(windows))
    params = jax.device_put(params)  # once, if they come from the host
    total = 0.0  # Python floats are float64: a sum of float32 losses would drift over a long text
    for start in tqdm(range(0, len(windows), batch), unit="batch", disable=None):
        part = windows[start : start + batch]
        # The shape, so the program, stays in the last batch, and in a window that is short.
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
    """Scores `text` by an artefact in its own runtime, otherwise as `perplexity`."""
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
    """Returns BOS and the text's tokens, and the windows over them."""
    ids = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    return ids, _windows(length, ids) if stride is None else strided(length, ids, stride)


def _result(
    total: float, tokenizer: Tokenizer, text: str, ids: np.ndarray, windows: list["Window"]
) -> PerplexityResult:
    """Returns what `total` nats over the windows' scored tokens mean."""
    if not math.isfinite(total):
        raise FloatingPointError(
            f"The loss of the text is {total}: the parameters are not finite, or overflow."
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
    """Tokens `start` to `stop` are read; what follows each from `scored` on is scored."""

    start: int
    scored: int
    stop: int


def _windows(length: int, ids: np.ndarray) -> list[Window]:
    """Returns the paper's: of `length` tokens, the last of which is only a target."""
    if length < 2:
        raise UserError(
            f"model.max_seq_len={length} must be at least 2 to score a text: a window's first "
            "token is not scored."
        )
    count = len(ids) // length
    if count == 0:
        raise UserError(
            f"The text has {len(ids)} tokens, BOS included, and must have at least the "
            f"{length} of one window (model.max_seq_len={length}); give a longer text, or "
            "--stride, which takes any."
        )
    starts = range(0, count * length, length)
    return [Window(start, start, start + length - 1) for start in starts]


def strided(length: int, ids: np.ndarray, stride: int) -> list[Window]:
    """Returns windows of at most `length` tokens that score every token but BOS once.

    Raises:
      UserError: if the stride is not within a window, or there is no token.
    """
    if not 1 <= stride <= length:
        raise UserError(
            f"--stride={stride} must be at least 1 and at most model.max_seq_len={length}."
        )
    last = len(ids) - 1  # it is only a target
    if last < 1:
        raise UserError("The text is empty; give one with at least a token.")
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
    """Returns the cross-entropy of what follows each token, in nats, float32."""
    model = Transformer(config).bind({"params": params})
    x_BTD = model.hidden(tokens_BT)
    return token_losses(x_BTD, head_matrix(params, config), targets_BT, _LOSS_CHUNK)


def _byte_lengths(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Returns the UTF-8 bytes of each token, as it stands inside a text.

    Exact for SentencePiece. A token of a byte-level BPE that ends in an unfinished character counts
    one byte for it, where it may be two or three.
    """
    # Behind another token, since decoding takes the space off the first one.
    before = tokenizer.encode("a")[-1]
    start = len(tokenizer.decode([before]))
    texts = {i: tokenizer.decode([before, i])[start:] for i in set(ids)}
    # A byte that is no character by itself is decoded to U+FFFD, which has three.
    return [
        len(texts[i].encode("utf-8")) - 2 * texts[i].count("\N{REPLACEMENT CHARACTER}") for i in ids
    ]
