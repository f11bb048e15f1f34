"""The grids make the comparisons of the paper's tables at every scale."""

import dataclasses
import math

import pytest

from mobilellm_jax.config import ConfigError, ModelConfig
from mobilellm_jax.paper.architectures import TABLE_ROWS
from mobilellm_jax.paper.grids import (
    GRIDS,
    GridName,
    GridRow,
    ScaleName,
    architecture,
    grid_rows,
)
from mobilellm_jax.paper.sizes import solve_width
from tests.paper.test_architectures import count  # counts without the formula of model/size.py

SMALL: tuple[ScaleName, ...] = ("tiny", "small")
BUDGETS = {"tiny": (1_400_000, 0.03), "small": (20_000_000, 0.03)}


def by_label(rows: tuple[GridRow, ...]) -> dict[tuple[str, str], GridRow]:
    found = {(row.group, row.label): row for row in rows}
    assert len(found) == len(rows), "each label in a group is unique"
    return found


def test_the_grids_of_the_paper_hold_all_its_rows() -> None:
    rows = [row for grid in GRIDS for row in grid_rows(grid, "paper")]
    assert all(row.model == row.paper.model for row in rows)
    # Table 14 repeats rows of Table 2. All other rows appear once.
    assert {id(row.paper) for row in rows} == {id(row) for row in TABLE_ROWS}
    assert [len(grid_rows(grid, "paper", "125M")) for grid in GRIDS] == [9, 8, 3, 15, 4, 4]
    long = [row for row in rows if row.length == 4]
    assert len(long) == 4 and all("1T" in row.label for row in long)


@pytest.mark.parametrize("scale", SMALL)
@pytest.mark.parametrize("grid", ["depth_width", "sharing", "repeats"])
def test_small_rows_have_equally_many_parameters(grid: GridName, scale: ScaleName) -> None:
    budget, tolerance = BUDGETS[scale]
    rows = grid_rows(grid, scale)
    assert len(rows) >= 4
    assert all(abs(count(row.model) / budget - 1) <= tolerance for row in rows)
    depths = {row.model.applied_depth for row in rows}
    assert len(depths) >= 2, "something is compared"


@pytest.mark.parametrize("scale", SMALL)
@pytest.mark.parametrize("grid", ["roadmap", "embedding", "heads"])
def test_small_counts_change_like_the_papers_counts(grid: GridName, scale: ScaleName) -> None:
    rows = by_label(grid_rows(grid, scale))
    compared = 0
    for row in rows.values():
        if not row.compared_with:
            continue
        reference = rows[row.group, row.compared_with]
        ours = count(row.model) / count(reference.model) - 1
        paper = count(row.paper.model) / count(reference.paper.model) - 1
        # Embedding and keys have another share of a small model, so the tolerance is wide.
        assert ours == pytest.approx(paper, abs=0.05), row.label
        assert abs(ours) < 0.01 or (ours > 0) == (paper > 0), row.label
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("scale", SMALL)
def test_small_rows_differ_in_the_same_fields_as_the_papers_rows(scale: ScaleName) -> None:
    for grid in GRIDS:
        for row in grid_rows(grid, scale):
            model, paper = row.model, row.paper.model
            for name in ("activation", "tie_embeddings", "num_repeats"):
                assert getattr(model, name) == getattr(paper, name), row
            assert model.num_repeats == 1 or model.sharing == paper.sharing
            assert model.num_heads * model.head_dim == model.embed_dim
            if grid == "heads":
                assert model.num_heads / model.num_kv_heads == paper.num_heads / paper.num_kv_heads
    gqa = by_label(grid_rows("roadmap", scale))["125M", "+ grouped-query attention"].model
    assert gqa.num_heads == 3 * gqa.num_kv_heads


def test_all_tiny_grids_are_twenty_models() -> None:
    rows = [row for grid in GRIDS for row in grid_rows(grid, "tiny")]
    models = {architecture(row.model): row.model for row in rows}
    assert (len(rows), len(models)) == (28, 20)
    assert all(1_000_000 <= count(model) <= 3_000_000 for model in models.values())


@pytest.mark.parametrize("scale", ["paper", *SMALL])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_row_except_the_reference_has_a_reference_row(
    grid: GridName, scale: ScaleName
) -> None:
    rows = by_label(grid_rows(grid, scale))
    for group in {group for group, _ in rows}:
        members = [row for row in rows.values() if row.group == group]
        assert len([row for row in members if not row.compared_with]) == 1
        assert all((group, row.compared_with) in rows for row in members if row.compared_with)


def test_the_roadmap_compares_with_the_step_before() -> None:
    before = {row.label: row.compared_with for row in grid_rows("roadmap", "paper", "350M")}
    assert before["+ SwiGLU"] == "baseline: ReLU feed-forward"
    assert before["+ layer sharing"] == "+ grouped-query attention"
    assert before["+ layer sharing, 1T tokens"] == "+ 1T tokens"
    depths = {row.label: row.compared_with for row in grid_rows("depth_width", "tiny")}
    assert depths["2 blocks, width 176"] == "6 blocks, width 112"


def test_a_small_scale_takes_the_vocabulary_of_the_data() -> None:
    rows = grid_rows("depth_width", "tiny", vocab_size=1000)
    assert {row.model.vocab_size for row in rows} == {1000}
    assert all(abs(count(row.model) / 1_400_000 - 1) <= 0.03 for row in rows)


MODEL = ModelConfig(
    vocab_size=1000, embed_dim=96, num_blocks=4, num_heads=6, num_kv_heads=2, head_dim=16,
    ffn_dim=256,
)  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 3, 9, 20])
def test_solved_width_meets_the_budget(blocks: int) -> None:
    model = solve_width(dataclasses.replace(MODEL, num_blocks=blocks), 1_500_000)
    assert abs(count(model) / 1_500_000 - 1) <= 0.03
    assert model.num_blocks == blocks and model.head_dim == 16
    assert model.num_heads == 3 * model.num_kv_heads
    assert model.embed_dim == 16 * model.num_heads
    # The feed-forward width stays close to 8/3 of the embedding.
    assert 1.5 < model.ffn_dim / model.embed_dim < 4.5


def test_the_solution_is_the_nearest_in_proportion() -> None:
    model = solve_width(MODEL, 1_500_000)
    best = []
    for kv_heads in range(1, 40):
        shape = {"num_kv_heads": kv_heads, "num_heads": 3 * kv_heads, "embed_dim": 48 * kv_heads}
        widths = [dataclasses.replace(model, **shape, ffn_dim=f) for f in range(8, 2000, 8)]
        nearest = min(widths, key=lambda m: abs(count(m) - 1_500_000))
        if abs(count(nearest) / 1_500_000 - 1) <= 0.03:
            best.append(nearest)
    assert len(best) > 3
    assert model == min(best, key=lambda m: abs(math.log(m.ffn_dim / m.embed_dim * 3 / 8)))


@pytest.mark.parametrize("parameters", [2_000, 50_000])
def test_a_number_that_no_width_gives_is_refused(parameters: int) -> None:
    with pytest.raises(ConfigError, match=f"{parameters:,} parameters within 3%"):
        solve_width(dataclasses.replace(MODEL, num_blocks=30), parameters)
