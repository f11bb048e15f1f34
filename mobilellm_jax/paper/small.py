"""Models of 1 to 30M parameters for the comparisons of the paper's 125M rows."""

import dataclasses

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.architectures import Row
from mobilellm_jax.paper.width import solve_ffn, solve_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallScale:
    """The proportions of a small scale to the paper's 125M models."""

    parameters: int  # parameters of the rows that compare depth with width
    divisor: int  # divisor of the paper's blocks and heads; repeats stay the same
    head_dim: int  # the paper has 64
    width: int  # width in the grids of heads and sharing; the paper has 896
    vocab_size: int
    max_seq_len: int
    left_out: frozenset[tuple[str, int]]  # (grid, blocks of the paper's row)


SMALL_SCALES = {
    "tiny": SmallScale(
        parameters=1_400_000,
        divisor=2,
        head_dim=16,
        width=128,
        vocab_size=2048,
        max_seq_len=256,
        # The halves of 6 and 24 blocks add little between their neighbours, and 62 blocks cost four
        # times the usual time. The remaining 20 models train in some hours on two CPU cores.
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

_GQA_GROWTH = 124.6 / 118.6  # growth of the parameters by grouped-query attention, Table 10
# These rows of Table 13 answer most of its question: (heads, kv heads).
_HEADS_KEPT = frozenset({(32, 32), (16, 16), (16, 4), (16, 2), (8, 8)})


def small_model(
    grid: str, row: Row, scale: SmallScale, vocab_size: int | None
) -> ModelConfig | None:
    """Returns the model that stands for a row of the paper, or None if the scale leaves it out.

    Rows with 1T tokens are left out: they cost four times as much and only compare run lengths.
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
    """Returns a model of the scale's width, which its heads divide as in Tables 2, 13 and 14."""
    heads = base.num_heads // scale.divisor
    model = dataclasses.replace(
        base,
        embed_dim=scale.width,
        num_heads=heads,
        num_kv_heads=max(1, base.num_kv_heads // scale.divisor),
        head_dim=scale.width // heads,
    )
    # The reference row, which has one key for each query, has the scale's number of parameters.
    full = dataclasses.replace(model, num_kv_heads=heads, tie_embeddings=False)
    return dataclasses.replace(model, ffn_dim=solve_ffn(full, scale.parameters).ffn_dim)


def _of_solved_width(base: ModelConfig, scale: SmallScale) -> ModelConfig:
    """Returns a model with about the scale's number of parameters, and its head width."""
    width = base.num_heads * scale.head_dim
    untied = dataclasses.replace(
        base,
        # In Table 1, the model with more blocks has the width of the untied model with 30 blocks.
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
