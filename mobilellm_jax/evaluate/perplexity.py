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
import math
from typing import NamedTuple, Self

import numpy as np
from tqdm import tqdm

from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import Engine
from mobilellm_jax.evaluate.prefix_trees import Query

_WINDOWS_AT_ONCE = 1024  # each call of the engine gets so many, which bounds the host's memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """How well a model predicts a text."""

    loss: float  # nats per scored token
    perplexity: float
    bits_per_byte: float  # over the bytes of the scored tokens
    tokens: int  # scored tokens
    windows: int


class Window(NamedTuple):
    """The model reads tokens `start` to `stop` - 1; tokens `scored` + 1 to `stop` are scored."""

    start: int
    scored: int
    stop: int


@dataclasses.dataclass(frozen=True)
class CutText:
    """A text as token ids, which begin with BOS, and the windows over them."""

    ids: np.ndarray
    windows: list[Window]
    scored_tokens: int
    scored_bytes: int

    @classmethod
    def cut(cls, tokenizer: Tokenizer, text: str, length: int, stride: int | None) -> Self:
        """Cuts a text into windows of `length` tokens, which is `model.max_seq_len`.

        Each window scores `stride` tokens. None gives the paper's windows.

        Raises:
          UserError: if the text is shorter than a window (with a stride: than a token), or the
            stride is longer than a window.
        """
        ids = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
        windows = _apart(length, ids) if stride is None else _strided(length, ids, stride)
        scored = np.zeros(len(ids), bool)
        for window in windows:
            scored[window.scored + 1 : window.stop + 1] = True
        others = sum(_byte_lengths(tokenizer, ids[~scored].tolist()))
        return cls(ids, windows, int(scored.sum()), len(text.encode("utf-8")) - others)

    def queries(self, windows: list[Window]) -> list[Query]:
        """Returns what a model reads and predicts in each window."""
        ids: list[int] = self.ids.tolist()
        return [
            Query(tuple(ids[w.start : w.stop]), tuple(ids[w.scored + 1 : w.stop + 1]))
            for w in windows
        ]


def perplexity(engine: Engine, text: CutText, *, show: bool = True) -> PerplexityResult:
    """Scores a text; with `show`, a terminal shows the progress."""
    windows = text.windows
    nats = 0.0
    with tqdm(total=len(windows), unit="window", disable=None if show else True) as bar:
        for first in range(0, len(windows), _WINDOWS_AT_ONCE):
            queries = text.queries(windows[first : first + _WINDOWS_AT_ONCE])
            for scores in engine.scores(queries):
                nats -= math.fsum(score.log_likelihood for _, score in scores)
                bar.update(len(scores))
    loss = nats / text.scored_tokens
    return PerplexityResult(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=nats / math.log(2) / text.scored_bytes,
        tokens=text.scored_tokens,
        windows=len(windows),
    )


def _apart(length: int, ids: np.ndarray) -> list[Window]:
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


def _strided(length: int, ids: np.ndarray, stride: int) -> list[Window]:
    """Returns windows of at most `length` tokens that together score every token except BOS."""
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
