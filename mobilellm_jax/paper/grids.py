"""The paper's ablations as grids of models, at the paper's sizes and at smaller sizes.

A grid contains the models that one table of the paper compares. At the scale `paper`, the models
have the paper's sizes (`architectures.py`). The scales `small` and `tiny` repeat the comparisons of
the 125M rows with smaller models. These scales divide the paper's numbers of blocks by
`SmallScale.divisor`. They choose the widths so that models of different depth have equally many
parameters; in the paper's Table 11, the number of parameters varies by a fifth. Every `GridRow`
contains the paper's row.
"""

import dataclasses
import operator
from typing import Literal, get_args

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.paper import architectures
from mobilellm_jax.paper.architectures import Row
from mobilellm_jax.paper.sizes import SMALL_SCALES, small_model

GridName = Literal["depth_width", "roadmap", "embedding", "heads", "sharing", "repeats"]
ScaleName = Literal["paper", "small", "tiny"]
GRIDS: tuple[GridName, ...] = get_args(GridName)
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)

SHAPE = (
    *("vocab_size", "embed_dim", "num_blocks", "num_repeats", "sharing", "num_heads"),
    *("num_kv_heads", "head_dim", "ffn_dim", "activation", "tie_embeddings"),
)
"""The model fields that determine the shapes of the weights and the order of the blocks.

Models with equal values may still differ in other fields, such as precision or initialization.
"""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A comparison in the paper."""

    title: str
    table: str  # Number of the paper's table.
    question: str


ABOUT: dict[GridName, Grid] = {
    "depth_width": Grid(
        "Depth against width",
        "11",
        "Is a deeper and thinner model better than a wider model with equally many parameters?",
    ),
    "roadmap": Grid(
        "Design roadmap",
        "10",
        "How much does each step from a plain baseline to MobileLLM-LS gain?",
    ),
    "embedding": Grid(
        "Embedding sharing",
        "1",
        "How much does it cost to use the input embeddings as output weights, and how much do more "
        "blocks gain with the saved parameters?",
    ),
    "heads": Grid(
        "Heads and key-value heads", "13", "How many heads and how many key-value heads are best?"
    ),
    "sharing": Grid(
        "Order of shared layers", "2", "Does applying every block twice help, and in which order?"
    ),
    "repeats": Grid("Number of repeats", "14", "How often should a block be applied?"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridRow:
    """One model of a grid."""

    grid: GridName
    scale: ScaleName
    group: str  # Group of the paper's row: 125M or 350M.
    label: str  # Name of the row, which is unique within its grid and group.
    compared_with: str  # Label of the reference row; "" if this row is the reference.
    model: ModelConfig
    length: int  # Factor for the recipe's number of steps: 4 for rows with 1T tokens, else 1.
    paper: Row


def grid_rows(
    grid: GridName, scale: ScaleName, group: str = "", vocab_size: int | None = None
) -> tuple[GridRow, ...]:
    """Returns the rows of a grid.

    At the scale `paper`, `group` is 125M, 350M or "" for both groups, and the vocabulary has 32,000
    tokens. A small scale has only the group 125M. Its vocabulary has `vocab_size` tokens; None
    means `SmallScale.vocab_size`.
    """
    rows = []
    for row in architectures.rows(ABOUT[grid].table, group if scale == "paper" else "125M"):
        model: ModelConfig | None = row.model
        if scale != "paper":
            model = small_model(grid, row, SMALL_SCALES[scale], vocab_size)
        if model is None:
            continue  # This scale does not contain the row.
        rows.append(
            GridRow(
                grid=grid,
                scale=scale,
                group=row.group,
                label=label(grid, row.step, model),
                compared_with="",
                model=model,
                length=row.tokens // architectures.ABLATION_TOKENS,
                paper=row,
            )
        )
    return tuple(dataclasses.replace(r, compared_with=_compared_with(r, rows)) for r in rows)


def label(grid: GridName, step: str, model: ModelConfig) -> str:
    """Returns the name of a row in its table."""
    tied = "tied" if model.tie_embeddings else "untied"
    repeats = f"{model.sharing.replace('_', '-')}, x{model.num_repeats}"
    return {
        "depth_width": f"{model.num_blocks} blocks, width {model.embed_dim}",
        "roadmap": step,
        "embedding": f"{model.num_blocks} blocks, {tied}",
        "heads": f"{model.num_heads} heads, {model.num_kv_heads} kv",
        "sharing": "not shared" if model.num_repeats == 1 else repeats,
        "repeats": f"x{model.num_repeats}",
    }[grid]


def shape_name(model: ModelConfig) -> str:
    """Returns a name that contains every value that a grid varies, for folders and curves."""
    parts = [
        f"{model.num_blocks}x{model.embed_dim}",
        f"h{model.num_heads}kv{model.num_kv_heads}",
        f"f{model.ffn_dim}",
    ]
    parts += [] if model.activation == "swiglu" else [model.activation]
    parts += ["tied"] if model.tie_embeddings else []
    parts += [f"{model.sharing}{model.num_repeats}"] if model.num_repeats > 1 else []
    return "-".join(parts)


def architecture(model: ModelConfig) -> tuple[object, ...]:
    """Returns the values of the fields in `SHAPE`; ignores `sharing` if no block is repeated."""
    shape = model if model.num_repeats > 1 else dataclasses.replace(model, sharing="immediate")
    return operator.attrgetter(*SHAPE)(shape)


def _compared_with(row: GridRow, rows: list[GridRow]) -> str:
    """Returns the label of the row's reference row.

    Each step of the roadmap is compared with the step before it, with two exceptions: layer sharing
    is compared with grouped-query attention, and layer sharing with 1T tokens is compared with 1T
    tokens alone. In every other grid, all rows are compared with the same row.
    """
    group = [r for r in rows if r.group == row.group]
    if row.grid == "roadmap":
        steps = [r.label for r in group]
        before = {
            "+ layer sharing": "+ grouped-query attention",
            "+ layer sharing, 1T tokens": "+ 1T tokens",
        }
        position = steps.index(row.label)
        return before.get(row.label, steps[position - 1] if position else "")

    def is_baseline(paper: ModelConfig) -> bool:
        return {
            "depth_width": paper.num_blocks == {"125M": 12, "350M": 15}[row.group],
            "embedding": not paper.tie_embeddings,
            "heads": paper.num_heads == paper.num_kv_heads == 16,
        }.get(row.grid, paper.num_repeats == 1)

    (baseline,) = [r for r in group if is_baseline(r.paper.model)]
    return "" if baseline.label == row.label else baseline.label
