"""Finds models with a given number of parameters, and the models of the small scales.

The small scales repeat the comparisons of the paper's 125M rows with models of 1 to 30M parameters.
"""

import dataclasses
import math

from mobilellm_jax.config import ConfigError, ModelConfig
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.architectures import Row

TOLERANCE = 0.03  # Largest accepted relative difference from the given number of parameters.
SOLVED = ("model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.ffn_dim")
"""The fields that `solve_width` sets."""

_FFN_STEP = 8  # Feed-forward widths are multiples of this number, which suits vector units.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallScale:
    """The sizes of the models of a small scale."""

    parameters: int  # Parameters of an untied model without grouped-query attention.
    divisor: int  # Divisor of the paper's number of blocks and, in grids with `width`, of heads.
    head_dim: int  # Channels of a head in grids that do not use `width`; the paper has 64.
    width: int  # Width in the grids `heads`, `sharing` and `repeats`; the paper has 896.
    vocab_size: int
    max_seq_len: int
    left_out: frozenset[tuple[str, int]]  # Omitted rows: (grid, blocks in the paper).


SMALL_SCALES = {
    "tiny": SmallScale(
        parameters=1_400_000,
        divisor=2,
        head_dim=16,
        width=128,
        vocab_size=2048,
        max_seq_len=256,
        # The rows with 6 and 24 blocks add little, because other rows have similar depths. The row
        # with 62 blocks would train four times as long as a usual row. The remaining 20 models
        # train in a few hours on two CPU cores.
        left_out=frozenset({("depth_width", 6), ("depth_width", 24), ("depth_width", 62)}),
    ),
    "small": SmallScale(
        parameters=20_000_000,
        divisor=1,
        head_dim=32,
        width=384,
        vocab_size=8192,
        max_seq_len=1024,
        left_out=frozenset(),
    ),
}

_GQA_GROWTH = 124.6 / 118.6  # Growth of parameters in the grouped-query step of Table 10.
# Rows of Table 13 that the small scales train: (heads, key-value heads). These rows compare three
# numbers of heads and three numbers of key-value heads.
_HEADS_KEPT = frozenset({(32, 32), (16, 16), (16, 4), (16, 2), (8, 8)})


def small_model(
    grid: str, row: Row, scale: SmallScale, vocab_size: int | None
) -> ModelConfig | None:
    """Returns the small model for a row of the paper, or None if the scale omits the row.

    The small scales omit the rows with 1T tokens, because these rows cost four times as much as
    other rows and compare only lengths of training.
    """
    paper = row.model
    if "1T" in row.step or (grid, paper.num_blocks) in scale.left_out:
        return None
    if grid == "heads" and (paper.num_heads, paper.num_kv_heads) not in _HEADS_KEPT:
        return None
    base = dataclasses.replace(
        paper,
        vocab_size=vocab_size or scale.vocab_size,
        num_blocks=paper.num_blocks // scale.divisor,
        max_seq_len=scale.max_seq_len,
    )
    if grid in ("heads", "sharing", "repeats"):
        return _of_fixed_width(base, scale)
    return _of_solved_width(base, scale)


def _of_fixed_width(base: ModelConfig, scale: SmallScale) -> ModelConfig:
    """Returns a model of the scale's width, divided among its heads as in Tables 2, 13 and 14."""
    heads = base.num_heads // scale.divisor
    model = dataclasses.replace(
        base,
        embed_dim=scale.width,
        num_heads=heads,
        num_kv_heads=max(1, base.num_kv_heads // scale.divisor),
        head_dim=scale.width // heads,
    )
    # All rows have the same feed-forward width. It gives `scale.parameters` parameters to the model
    # in which each query head has its own key-value head.
    full = dataclasses.replace(model, num_kv_heads=heads, tie_embeddings=False)
    return dataclasses.replace(model, ffn_dim=solve_ffn(full, scale.parameters).ffn_dim)


def _of_solved_width(base: ModelConfig, scale: SmallScale) -> ModelConfig:
    """Returns a model with about `scale.parameters` parameters and heads of `scale.head_dim`."""
    width = base.num_heads * scale.head_dim
    untied = dataclasses.replace(
        base,
        # In Table 1, every tied model has the width of the untied model with 30 blocks.
        num_blocks=30 // scale.divisor if base.tie_embeddings else base.num_blocks,
        num_repeats=1,
        num_kv_heads=base.num_heads,
        head_dim=scale.head_dim,
        embed_dim=width,
        ffn_dim=round(base.ffn_dim / base.embed_dim * width),
        tie_embeddings=False,
    )
    model = dataclasses.replace(
        solve_width(untied, scale.parameters),
        num_blocks=base.num_blocks,
        tie_embeddings=base.tie_embeddings,
    )
    if base.num_kv_heads < base.num_heads:
        group = base.num_heads // base.num_kv_heads
        wanted = round(_GQA_GROWTH * parameter_count(model))
        grouped = dataclasses.replace(
            model,
            num_heads=group,
            num_kv_heads=1,
            embed_dim=group * scale.head_dim,
            ffn_dim=round(group * scale.head_dim * model.ffn_dim / model.embed_dim),
        )
        model = solve_width(grouped, wanted)
    return dataclasses.replace(model, num_repeats=base.num_repeats, sharing=base.sharing)


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
        ratio = parameter_count(candidate) / parameters
        if ratio > 1 + TOLERANCE and candidate.ffn_dim == _FFN_STEP:
            break  # Wider models are even larger.
        if abs(ratio - 1) <= TOLERANCE:
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
