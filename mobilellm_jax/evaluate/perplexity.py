"""Measures the perplexity of a text, in the paper's windows or in overlapping windows.

If the tokenizer puts BOS before every text, it is put before this text too. The tokens are cut into
windows of T tokens, by default `model.max_seq_len`. Without a stride, windows do not overlap, as in
the paper's evaluation script. In each window, T - 1 tokens are scored, because the first token has
no context. The tokens after the last full window are not scored. A text that is shorter than a
window is one short window.

With a stride, windows overlap, and every token except the first is scored exactly once. In a
window, the model reads T tokens and predicts the token after each of them. The first window scores
all T predictions. Each later window scores its last `stride` predictions, and the last window only
the predictions that are left. For each scored token, the model sees at least T - stride earlier
tokens, or all earlier tokens.

The loss is the mean over all scored tokens, and the perplexity is exp(loss). The bits per byte are
loss * tokens / (ln 2 * bytes of the scored tokens). They compare models with different tokenizers.
"""

import dataclasses
import math
from typing import NamedTuple, Self

import numpy as np
from tqdm import tqdm

from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, text_ids
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import Engine
from mobilellm_jax.evaluate.prefix_trees import Query

_WINDOWS_AT_ONCE = 1024  # Windows per call of the engine; this limits the memory on the host.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """How well a model predicts a text."""

    loss: float  # Mean loss of the scored tokens, in nats.
    perplexity: float
    bits_per_byte: float  # Bits per byte of the scored tokens.
    tokens: int  # Number of scored tokens.
    windows: int


class Window(NamedTuple):
    """Token indices: the model reads `start` ... `stop` - 1 and scores `scored` + 1 ... `stop`."""

    start: int
    scored: int
    stop: int


@dataclasses.dataclass(frozen=True)
class CutText:
    """The token ids of a text, and the windows into which they are cut."""

    ids: np.ndarray
    windows: list[Window]
    scored_tokens: int
    scored_bytes: int

    @classmethod
    def cut(cls, tokenizer: Tokenizer, text: str, length: int, stride: int | None) -> Self:
        """Cuts a text into windows of `length` tokens; a shorter text is one window.

        Each window scores `stride` tokens. If `stride` is None, the windows are the paper's.

        Raises:
          UserError: if the text has no token to score, or the stride is not between 1 and `length`.
        """
        ids = np.asarray(text_ids(tokenizer, text), np.int32)
        windows = _apart(length, ids) if stride is None else _strided(length, ids, stride)
        scored = np.zeros(len(ids), bool)
        for window in windows:
            scored[window.scored + 1 : window.stop + 1] = True
        others = sum(_byte_lengths(tokenizer, ids[~scored].tolist()))
        return cls(ids, windows, int(scored.sum()), len(text.encode("utf-8")) - others)

    def queries(self, windows: list[Window]) -> list[Query]:
        """Returns one query per window: the tokens that the model reads and the tokens to score."""
        ids: list[int] = self.ids.tolist()
        return [
            Query(tuple(ids[w.start : w.stop]), tuple(ids[w.scored + 1 : w.stop + 1]))
            for w in windows
        ]


def perplexity(engine: Engine, text: CutText, *, show: bool = True) -> PerplexityResult:
    """Scores a text; with `show`, a progress bar appears on a terminal."""
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
        perplexity=exp(loss),
        bits_per_byte=nats / math.log(2) / text.scored_bytes,
        tokens=text.scored_tokens,
        windows=len(windows),
    )


def exp(loss: float) -> float:
    """Returns e to the power of a loss, or infinity if no float is so large (above 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _apart(length: int, ids: np.ndarray) -> list[Window]:
    """Returns the paper's windows: they do not overlap, and their first token is not scored."""
    if length < 2:
        raise UserError(
            f"model.max_seq_len={length} must be at least 2 to score a text, because the first "
            "token of a window is not scored."
        )
    if len(ids) < length:
        return [Window(0, 0, _last(ids))]
    count = len(ids) // length
    starts = range(0, count * length, length)
    return [Window(start, start, start + length - 1) for start in starts]


def _strided(length: int, ids: np.ndarray, stride: int) -> list[Window]:
    """Returns overlapping windows that score every token except the first exactly once."""
    if not 1 <= stride <= length:
        raise UserError(
            f"--stride={stride} must be at least 1 and at most {length}, the tokens of a window."
        )
    last = _last(ids)
    windows = [Window(0, 0, min(length, last))]
    while windows[-1].stop < last:
        scored = windows[-1].stop
        stop = min(scored + stride, last)
        windows.append(Window(stop - length, scored, stop))
    return windows


def _last(ids: np.ndarray) -> int:
    """Returns the index of the last token, which is scored but never read."""
    if len(ids) < 2:
        raise UserError("The text has no token to score; give a longer text.")
    return len(ids) - 1


def _byte_lengths(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Returns the number of UTF-8 bytes that each token adds to a text.

    The number is exact for SentencePiece. A token of a byte-level BPE may end with a part of a
    character. Such a part counts as one byte, although it may have two or three.
    """
    # A decoder drops the space at the start of a text, so we put another token in front of each
    # token.
    before = tokenizer.encode("a")[-1]
    start = len(tokenizer.decode([before]))
    texts = {i: tokenizer.decode([before, i])[start:] for i in set(ids)}
    # A part of a character is decoded to U+FFFD, which has three bytes; we count one byte.
    return [
        len(texts[i].encode("utf-8")) - 2 * texts[i].count("\N{REPLACEMENT CHARACTER}") for i in ids
    ]
