"""Perplexity of a text, as the paper's evaluation script measures it.

The text, behind one BOS, is cut into windows of the model's length T, without overlap; the first
token of a window predicts the second, and so on, so that each scores T - 1 tokens; what is left
after the last full window is dropped. The loss is the mean over all scored tokens, and
perplexity = exp(loss). Bits per byte, loss * tokens / (ln 2 * bytes of text that the scored tokens
stand for), compares models with different tokenizers.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizer import Tokenizer
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
    batch_size: int | None = None,
) -> PerplexityResult:
    """Scores `text` in windows of `model.max_seq_len` tokens; shows progress on a terminal.

    Args:
      config: the architecture.
      params: its parameters.
      tokenizer: the one it was trained with.
      text: at least a window long.
      batch_size: windows at once; changes nothing but speed and memory. None: 8192 tokens' worth.

    Raises:
      ValueError: if the text is shorter than a window.
      FloatingPointError: if the model gives no finite loss.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    windows_WT = _windows(config, ids)
    count, length = windows_WT.shape
    batch = min(batch_size or max(1, _BATCH_TOKENS // length), count)
    params = jax.device_put(params)  # once, if they come from the host
    total = 0.0  # Python floats are float64: a sum of float32 losses would drift over a long text
    for start in tqdm(range(0, count, batch), unit="batch", disable=None):
        rows_BT = windows_WT[start : start + batch]
        missing = batch - len(rows_BT)  # in the last batch; the shape, so the program, stays
        losses_BT = _losses(params, np.pad(rows_BT, ((0, missing), (0, 0))), config)
        total += float(np.asarray(losses_BT)[: len(rows_BT)].sum(dtype=np.float64))
    if not math.isfinite(total):
        raise FloatingPointError(
            f"The loss of the text is {total}: the parameters are not finite, or overflow."
        )
    # Not scored: the first token of each window (BOS in the first), and what follows the last.
    unscored = [*windows_WT[1:, 0].tolist(), *ids[windows_WT.size :]]
    scored_bytes = len(text.encode("utf-8")) - sum(_byte_lengths(tokenizer, unscored))
    tokens = count * (length - 1)
    loss = total / tokens
    return PerplexityResult(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=total / math.log(2) / scored_bytes,
        tokens=tokens,
        windows=count,
    )


def _windows(config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Returns the full windows, a row each."""
    length = config.max_seq_len
    if length < 2:
        raise ValueError(
            f"model.max_seq_len={length} must be at least 2 to score a text: a window's first "
            "token is not scored."
        )
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, BOS included, and must have at least the "
            f"{length} of one window (model.max_seq_len={length}); give a longer text."
        )
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


@functools.partial(jax.jit, static_argnames="config")
def _losses(
    params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T-1"]:
    """Returns the cross-entropy of each window's second to last token, in nats, float32."""
    model = Transformer(config).bind({"params": params})
    x_BTD = model.hidden(tokens_BT[:, :-1])
    return token_losses(x_BTD, head_matrix(params, config), tokens_BT[:, 1:], _LOSS_CHUNK)


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
