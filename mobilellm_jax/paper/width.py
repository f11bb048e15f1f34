"""Finds the width at which a model has a given number of parameters."""

import dataclasses
import math

from mobilellm_jax.config import ConfigError, ModelConfig
from mobilellm_jax.model.size import parameter_count

TOLERANCE = 0.03  # Largest accepted relative difference from the given number of parameters.
SOLVED = ("model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.ffn_dim")
"""The fields that `solve_width` sets."""

_FFN_STEP = 8  # Feed-forward widths are multiples of this number, which suits vector units.


def solve_ffn(model: ModelConfig, parameters: int) -> ModelConfig:
    """Returns the model with `ffn_dim` set so that its size is closest to `parameters`."""
    narrow, wide = (dataclasses.replace(model, ffn_dim=f) for f in (_FFN_STEP, 2 * _FFN_STEP))
    step = parameter_count(wide) - parameter_count(narrow)
    steps = round((parameters - parameter_count(narrow)) / step)
    return dataclasses.replace(model, ffn_dim=_FFN_STEP * (1 + max(0, steps)))


def solve_width(model: ModelConfig, parameters: int) -> ModelConfig:
    """Returns the model at the width that gives `parameters` parameters; the depth stays the same.

    As in the paper's Table 11, the number of channels per head is the same in all rows. The width
    is therefore a multiple of the width of one group of query heads. For each width, the function
    chooses the feed-forward width that brings the parameter count closest to `parameters`. A width
    is a candidate if this count is within 3% of `parameters`. The function returns the candidate
    whose ratio of feed-forward width to embedding width is closest to the ratio in `model`.

    Raises:
      ConfigError: if no width is a candidate.
    """
    group = model.num_heads // model.num_kv_heads
    proportion = model.ffn_dim / model.embed_dim
    found: list[tuple[float, ModelConfig]] = []
    for kv_heads in range(1, 1 + parameters // (2 * model.vocab_size) // model.head_dim + 64):
        heads = kv_heads * group
        width, rest = divmod(heads * model.embed_dim, model.num_heads)
        if rest:
            continue
        heads_set = dataclasses.replace(
            model, embed_dim=width, num_heads=heads, num_kv_heads=kv_heads
        )
        candidate = solve_ffn(heads_set, parameters)
        if abs(parameter_count(candidate) / parameters - 1) <= TOLERANCE:
            off = abs(math.log(candidate.ffn_dim / width / proportion))
            found.append((off, candidate))
    if not found:
        raise ConfigError(
            f"no width gives model.num_blocks={model.num_blocks} with "
            f"model.head_dim={model.head_dim} and model.vocab_size={model.vocab_size} "
            f"{parameters:,} parameters within {TOLERANCE:.0%}; choose another number, fewer "
            "blocks, narrower heads or a smaller vocabulary."
        )
    return min(found, key=lambda pair: pair[0])[1]
