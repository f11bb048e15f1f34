"""The paper's published models and the rows of its ablation tables.

Source: Liu et al. 2024, arXiv:2402.14905v2, Tables 1, 2 and 9 to 14. All models have a vocabulary
of 32,000 tokens and a context of 2048 tokens. This module does not contain Table 16 (distillation),
because that table does not print the shapes of its models.

The paper prints neither the width of the feed-forward layer nor the width of a head. This module
computes the first with `ffn_width`, and the second as embed_dim / num_heads. The parameter counts
then differ from the printed counts by at most 0.11M, or by at most 0.5M where the paper prints
whole millions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import assert_never

from mobilellm_jax.config import Activation, ModelConfig, Sharing

# TASKS names the zero-shot accuracies on eight tasks in percent, and their mean. QA_TASKS names the
# scores of Table 12: the F1 score on TriviaQA with 1, 5 and 64 shots, and the accuracy on RACE.
TASKS = (
    *("arc_easy", "arc_challenge", "boolq", "piqa", "siqa", "hellaswag", "openbookqa"),
    *("winogrande", "average"),
)
QA_TASKS = (
    *("triviaqa_f1_1shot", "triviaqa_f1_5shot", "triviaqa_f1_64shot"),
    *("race_middle", "race_high"),
)


ABLATION_TOKENS = 250_000_000_000
"""Number of training tokens of each ablation: the paper trains for 120,000 steps."""
_TRILLION = 1_000_000_000_000  # Number of training tokens of the published models.


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a trained model and its scores."""

    tables: tuple[str, ...]  # Numbers of the tables that print the row.
    group: str  # Size of the models: 125M or 350M.
    model: ModelConfig
    params_millions: float  # Number of parameters that the paper prints.
    scores: dict[str, float]  # Scores by their names in TASKS and QA_TASKS.
    step: str = ""  # Step of the design roadmap in Table 10; "" in other tables.
    tokens: int = ABLATION_TOKENS  # Number of training tokens.


def ffn_width(embed_dim: int, activation: Activation = "swiglu") -> int:
    """Returns the hidden width of a feed-forward layer; SwiGLU layers use LLaMA's formula."""
    match activation:
        case "swiglu":
            return -(-(8 * embed_dim // 3) // 256) * 256
        case "relu" | "gelu":
            return 4 * embed_dim
        case _:
            assert_never(activation)


def _model(
    num_blocks: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    *,
    activation: Activation = "swiglu",
    tied: bool = False,
    sharing: Sharing = "immediate",
    num_repeats: int = 1,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=embed_dim,
        num_blocks=num_blocks,
        num_repeats=num_repeats,
        sharing=sharing,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads,
        ffn_dim=ffn_width(embed_dim, activation),
        activation=activation,
        tie_embeddings=tied,
        max_seq_len=2048,
    )


_relu = functools.partial(_model, activation="relu")
_tied = functools.partial(_model, tied=True)
_shared = functools.partial(_model, tied=True, num_repeats=2)

# Table 9. The LS models (layer sharing) have the same shapes, and they apply each block twice.
MOBILELLM = {
    "125m": _tied(30, 9, 3, 576),
    "350m": _tied(32, 15, 5, 960),
    "600m": _tied(40, 18, 6, 1152),
    "1b": _tied(54, 20, 5, 1280),
    "1_5b": _tied(54, 25, 5, 1600),
    "ls_125m": _shared(30, 9, 3, 576),
    "ls_350m": _shared(32, 15, 5, 960),
}


def _scores(text: str) -> dict[str, float]:
    """Returns the scores in `text`, in the order of TASKS and QA_TASKS; "-" means unknown."""
    names = (*TASKS, *QA_TASKS)
    return {n: float(score) for n, score in zip(names, text.split(), strict=False) if score != "-"}


# Scores of the published models from Tables 3, 4 and 8.
MOBILELLM_SCORES = {
    "125m": _scores("43.9 27.1 60.2 65.3 42.4 38.9 39.5 53.1 46.3 13.9 14.3 12.5 39.7 28.9"),
    "350m": _scores("53.8 33.5 62.4 68.6 44.7 49.6 40.0 57.6 51.3 22.0 23.9 24.2 45.6 33.8"),
    "600m": _scores("58.1 35.8 61.0 72.3 44.9 55.9 47.9 58.6 54.3"),
    "1b": _scores("63.0 39.0 66.7 74.4 45.0 61.4 46.8 62.3 57.3"),
    "1_5b": _scores("67.5 40.9 65.7 74.8 46.4 64.5 50.5 64.7 59.4"),
    "ls_125m": _scores("45.8 28.7 60.4 65.7 42.9 39.5 41.1 52.1 47.0 14.2 - - 40.7 29.6"),
    "ls_350m": _scores("54.4 32.5 62.8 69.8 44.1 50.6 45.8 57.2 52.1 - - - 47.3 33.7"),
}

_BLOCKS_AND_WIDTH = {"125M": (8, 896), "350M": (15, 1280)}  # Shapes in Tables 2, 13 and 14.

# The string at the end of each row below holds the scores, in the order of TASKS and QA_TASKS.

_DEPTH_VERSUS_WIDTH = {  # Columns: blocks, width, millions of parameters. Heads have 64 channels.
    "125M": (
        (4, 1280, 163.2, "42.0 26.1 61.0 61.5 41.3 32.9 31.4 49.8 43.3 2.0 3.9 3.9 33.2 26.0"),
        (6, 1024, 142.6, "42.2 25.5 51.0 62.6 41.6 33.5 32.1 50.0 42.3 3.5 4.9 4.6 29.2 25.5"),
        (8, 896, 138.1, "43.6 25.5 48.6 61.8 40.9 34.0 37.5 52.0 43.0 4.2 5.2 4.7 29.2 24.3"),
        (12, 768, 134.1, "43.1 28.9 58.1 62.3 42.3 34.6 31.5 50.1 43.9 5.1 6.1 6.3 35.6 27.3"),
        (18, 640, 132.4, "41.0 25.5 59.3 62.6 41.6 34.2 36.7 50.1 43.9 4.7 6.8 5.2 34.3 27.4"),
        (24, 576, 132.4, "43.6 27.0 59.7 63.8 42.0 36.2 33.7 52.2 44.8 5.9 7.2 7.3 35.3 28.6"),
        (30, 512, 135.0, "43.6 26.1 58.0 62.5 42.6 36.5 37.5 51.5 44.8 6.2 6.8 6.9 34.2 27.9"),
        (42, 448, 134.6, "43.3 26.1 57.8 63.3 41.7 36.3 35.9 52.0 44.5 6.1 7.2 7.2 34.4 28.6"),
        (62, 384, 134.3, "44.1 26.7 59.0 64.7 42.4 36.2 33.1 51.3 44.7 6.0 7.0 7.3 38.9 28.9"),
    ),
    "350M": (
        (5, 2048, 388.0, "47.9 28.8 62.2 65.2 42.8 38.1 39.0 52.6 47.1 5.6 7.8 8.6 38.1 29.0"),
        (10, 1536, 381.4, "49.1 29.6 60.6 67.1 44.0 42.7 41.2 54.4 48.6 9.0 11.8 12.7 40.6 30.0"),
        (12, 1408, 379.9, "49.9 31.6 59.1 68.2 42.6 44.0 43.7 53.8 49.1 11.7 12.9 13.3 42.4 31.5"),
        (15, 1280, 386.7, "49.2 30.6 59.1 67.7 44.3 43.2 41.0 54.2 48.7 10.7 13.1 14.2 42.6 30.6"),
        (19, 1152, 376.3, "50.8 30.9 56.3 69.1 43.8 45.2 39.6 54.5 48.8 11.3 13.3 13.5 42.6 32.4"),
        (24, 1024, 373.8, "50.7 33.8 58.8 68.6 43.5 45.0 40.0 54.9 49.4 11.8 13.5 14.4 43.0 31.9"),
        (28, 960, 371.1, "51.7 33.2 57.6 67.9 42.9 46.0 37.7 53.9 48.9 12.5 13.6 14.9 42.8 32.3"),
        (32, 896, 380.3, "50.7 31.4 59.4 67.8 43.3 46.2 43.8 56.2 49.8 12.6 14.5 15.3 44.2 32.2"),
        (46, 768, 374.7, "49.7 30.5 59.5 68.1 45.1 44.9 43.4 55.5 49.6 13.0 15.4 15.6 44.7 31.4"),
        (66, 640, 376.2, "50.5 31.8 61.0 67.4 43.8 46.0 40.1 55.6 49.5 12.5 15.1 15.7 44.0 32.5"),
    ),
}

_HEADS = (  # Columns: group, heads, key-value heads, millions of parameters.
    ("125M", 32, 32, 138.1, "42.1 26.9 58.4 62.2 42.1 33.8 36.7 52.4 44.3"),
    ("125M", 32, 16, 131.7, "41.2 26.4 57.7 62.5 42.3 33.3 34.2 52.9 43.8"),
    ("125M", 32, 8, 128.5, "42.6 27.3 61.1 61.9 41.9 32.2 35.0 52.0 44.2"),
    ("125M", 32, 4, 126.8, "43.1 26.8 59.8 62.7 41.4 32.5 34.4 51.1 44.0"),
    ("125M", 32, 2, 126.0, "39.8 26.7 59.4 59.4 42.0 31.3 32.6 52.9 43.0"),
    ("125M", 32, 1, 125.6, "41.0 24.3 59.1 60.8 41.2 31.4 35.4 52.0 43.1"),
    ("125M", 16, 16, 138.1, "41.6 25.7 61.1 62.4 43.1 34.4 36.9 51.6 44.6"),
    ("125M", 16, 8, 131.7, "42.4 26.4 60.7 63.4 41.9 33.5 34.7 51.5 44.3"),
    ("125M", 16, 4, 128.5, "42.5 25.6 62.3 62.4 41.8 33.0 35.9 54.5 44.7"),
    ("125M", 16, 2, 126.8, "41.7 25.3 56.9 61.7 42.0 32.9 32.6 54.5 43.5"),
    ("125M", 16, 1, 126.0, "40.4 26.3 61.8 63.2 41.7 32.0 34.0 50.4 43.7"),
    ("125M", 8, 8, 138.1, "41.4 25.0 58.3 61.7 41.7 33.3 35.9 53.2 43.8"),
    ("125M", 8, 4, 131.7, "43.3 28.2 58.3 61.8 42.8 33.8 30.9 53.0 44.0"),
    ("125M", 8, 2, 128.5, "40.7 26.2 58.1 61.2 41.6 32.8 34.8 51.5 43.4"),
    ("125M", 8, 1, 126.8, "42.5 24.8 59.4 62.3 42.0 32.0 36.3 51.3 43.8"),
    ("350M", 32, 32, 386.7, "48.6 30.4 59.7 67.2 43.9 44.0 40.9 53.9 48.6"),
    ("350M", 32, 16, 362.1, "48.9 31.6 57.6 68.4 43.4 43.8 38.6 54.9 48.4"),
    ("350M", 32, 8, 349.8, "48.3 33.1 61.0 67.2 42.6 42.1 39.0 53.9 48.4"),
    ("350M", 32, 4, 343.7, "47.2 29.8 59.4 67.2 43.5 42.5 42.5 54.1 48.3"),
    ("350M", 32, 2, 340.6, "47.6 30.3 62.4 66.9 42.6 41.6 38.6 52.0 47.7"),
    ("350M", 32, 1, 339.0, "48.5 27.3 56.3 67.1 42.9 40.9 36.7 53.3 46.6"),
    ("350M", 16, 16, 386.7, "50.8 30.6 62.3 68.6 43.5 45.1 43.8 52.4 49.6"),
    ("350M", 16, 8, 362.1, "48.5 30.7 59.4 67.3 43.8 43.8 41.3 53.3 48.5"),
    ("350M", 16, 4, 349.8, "49.9 30.6 60.0 69.2 43.5 44.2 41.8 55.8 49.4"),
    ("350M", 16, 2, 343.7, "49.3 28.4 55.0 67.3 42.7 42.6 40.3 54.5 47.5"),
    ("350M", 16, 1, 340.6, "49.2 29.3 58.8 67.4 43.5 42.1 39.9 52.8 47.9"),
    ("350M", 8, 8, 386.7, "51.0 33.2 58.2 67.0 43.9 43.9 42.6 54.7 49.3"),
    ("350M", 8, 4, 362.1, "50.0 31.3 60.2 66.0 42.7 43.7 40.9 53.7 48.6"),
    ("350M", 8, 2, 349.8, "49.3 30.4 59.9 67.9 42.8 43.5 38.9 53.8 48.3"),
    ("350M", 8, 1, 343.7, "48.0 27.7 61.5 67.1 43.1 42.5 37.3 54.7 47.8"),
)

_ROADMAP_STEPS: tuple[tuple[str, Callable[..., ModelConfig], int], ...] = (
    ("baseline: ReLU feed-forward", _relu, ABLATION_TOKENS),
    ("+ SwiGLU", _model, ABLATION_TOKENS),
    ("+ deep and thin", _model, ABLATION_TOKENS),
    ("+ embedding sharing", _tied, ABLATION_TOKENS),
    ("+ grouped-query attention", _tied, ABLATION_TOKENS),
    ("+ 1T tokens", _tied, _TRILLION),
    ("+ layer sharing", _shared, ABLATION_TOKENS),
    ("+ layer sharing, 1T tokens", _shared, _TRILLION),
)
_ROADMAP = {  # Columns: blocks, heads, key-value heads, width, millions of parameters.
    "125M": (
        (12, 12, 12, 768, 134.1, "41.3 25.2 57.5 62.0 41.9 31.1 31.2 50.8 42.6"),
        (12, 12, 12, 768, 134.1, "43.1 28.9 58.1 62.3 42.3 34.6 31.5 50.1 43.9"),
        (30, 8, 8, 512, 135.0, "43.6 26.1 58.0 62.5 42.6 36.5 37.5 51.5 44.8"),
        (30, 8, 8, 512, 118.6, "44.4 26.0 56.2 62.8 43.1 35.9 36.0 52.6 44.6"),
        (30, 9, 3, 576, 124.6, "45.5 27.7 58.3 64.6 41.9 36.4 35.4 50.4 45.0"),
        (30, 9, 3, 576, 124.6, "43.9 27.1 60.2 65.3 42.4 38.9 39.5 53.1 46.3"),
        (30, 9, 3, 576, 124.6, "44.4 27.0 61.5 65.1 43.0 37.6 37.8 52.0 46.1"),
        (30, 9, 3, 576, 124.6, "45.8 28.7 60.4 65.7 42.9 39.5 41.1 52.1 47.0"),
    ),
    "350M": (
        (15, 20, 20, 1280, 376.8, "50.3 27.6 53.8 68.1 44.1 42.6 40.1 52.4 47.4"),
        (15, 20, 20, 1280, 386.7, "49.2 30.6 59.1 67.7 44.3 43.2 41.0 54.2 48.7"),
        (32, 14, 14, 896, 380.3, "50.7 31.4 59.4 67.8 43.3 46.2 43.8 56.2 49.8"),
        (32, 14, 14, 896, 351.6, "49.9 32.0 60.3 67.9 43.2 47.0 38.9 54.8 49.2"),
        (32, 15, 5, 960, 345.3, "51.4 31.3 61.0 68.1 43.6 47.2 41.6 55.4 49.9"),
        (32, 15, 5, 960, 345.3, "53.8 33.5 62.4 68.6 44.7 49.6 40.0 57.6 51.3"),
        (32, 15, 5, 960, 345.3, "51.9 35.2 59.6 68.9 43.4 47.2 43.3 58.4 51.0"),
        (32, 15, 5, 960, 345.3, "54.4 32.5 62.8 69.8 44.1 50.6 45.8 57.2 52.1"),
    ),
}

_SHARING: tuple[tuple[str, str, Sharing, int, float, str], ...] = (
    # Columns: tables, group, order, repeats, millions of parameters. Each model has 16 heads.
    ("2 14", "125M", "immediate", 1, 138.1, "41.6 25.7 61.1 62.4 43.1 34.4 36.9 51.6 44.6"),
    ("2 14", "125M", "immediate", 2, 138.1, "43.9 27.9 61.5 64.3 41.5 35.5 35.1 50.2 45.0"),
    ("2", "125M", "repeat_all", 2, 138.1, "43.6 27.1 60.7 63.4 42.6 35.5 36.9 51.7 45.2"),
    ("2", "125M", "reverse", 2, 138.1, "43.8 26.0 58.9 62.9 42.2 35.2 36.8 52.2 44.8"),
    ("2 14", "350M", "immediate", 1, 386.7, "50.8 30.6 62.3 68.6 43.5 45.1 43.8 52.4 49.6"),
    ("2 14", "350M", "immediate", 2, 386.7, "51.5 30.8 59.6 68.2 43.9 47.7 44.7 55.0 50.2"),
    ("2", "350M", "repeat_all", 2, 386.7, "53.5 33.0 61.2 69.4 43.2 48.3 42.2 54.6 50.7"),
    ("2", "350M", "reverse", 2, 386.7, "50.7 32.2 61.0 68.8 43.8 47.4 43.1 53.8 50.1"),
    ("14", "125M", "immediate", 3, 138.1, "43.3 27.6 60.9 63.0 42.3 35.6 34.1 52.9 45.0"),
    ("14", "125M", "immediate", 4, 138.1, "42.0 26.6 62.3 64.4 41.5 36.2 35.8 53.9 45.3"),
    ("14", "350M", "immediate", 3, 386.7, "49.6 32.0 57.3 68.4 43.9 47.0 40.6 56.2 49.4"),
    ("14", "350M", "immediate", 4, 386.7, "52.2 32.6 60.0 69.0 44.5 47.6 41.8 55.2 50.4"),
)

# Columns: blocks, tied, millions of parameters. The 125M models have 8 heads and a width of 512.
_EMBEDDING_SHARING = (
    (30, False, 135, "43.6 26.1 58.0 62.5 42.6 36.5 37.5 51.5 44.8"),
    (30, True, 119, "44.4 26.0 56.2 62.8 43.1 35.9 36.0 52.6 44.6"),
    (32, True, 125, "43.3 26.4 54.4 64.7 43.5 36.9 38.5 52.6 45.0"),
)


TABLE_ROWS: tuple[Row, ...] = (
    *(
        Row(("11", "12"), group, _model(blocks, heads, heads, dim), params, _scores(scores))
        for group, lines in _DEPTH_VERSUS_WIDTH.items()
        for blocks, dim, params, scores in lines
        for heads in [dim // 64]
    ),
    *(
        Row(("13",), group, _model(blocks, heads, kv_heads, dim), params, _scores(scores))
        for group, heads, kv_heads, params, scores in _HEADS
        for blocks, dim in [_BLOCKS_AND_WIDTH[group]]
    ),
    *(
        Row(("10",), group, model(*shape), params, _scores(scores), step, tokens)
        for group, lines in _ROADMAP.items()
        for (step, model, tokens), (*shape, params, scores) in zip(
            _ROADMAP_STEPS, lines, strict=True
        )
    ),
    *(
        Row(
            tuple(tables.split()),
            group,
            _model(blocks, 16, 16, dim, sharing=sharing, num_repeats=repeats),
            params,
            _scores(scores),
        )
        for tables, group, sharing, repeats, params, scores in _SHARING
        for blocks, dim in [_BLOCKS_AND_WIDTH[group]]
    ),
    *(
        Row(("1",), "125M", _model(blocks, 8, 8, 512, tied=tied), params, _scores(scores))
        for blocks, tied, params, scores in _EMBEDDING_SHARING
    ),
)


def rows(table: str = "", group: str = "") -> tuple[Row, ...]:
    """Returns the rows of one table ("11") and one group ("125M"); "" selects all."""
    return tuple(
        row
        for row in TABLE_ROWS
        if (not table or table in row.tables) and (not group or group == row.group)
    )
