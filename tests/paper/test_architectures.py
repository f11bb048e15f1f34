import dataclasses

import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.paper.architectures import (
    MOBILELLM,
    MOBILELLM_SCORES,
    QA_TASKS,
    TABLE_ROWS,
    TASKS,
    Row,
    ffn_width,
    rows,
)

# Exact totals with norms; the paper prints 124.6M, 345.3M, 603.1M, 1.0B and 1.5B.
PARAMETERS = {
    "125m": 124_635_456,
    "350m": 345_355_200,
    "600m": 603_188_352,
    "1b": 1_005_461_760,
    "1_5b": 1_511_188_800,
    "ls_125m": 124_635_456,
    "ls_350m": 345_355_200,
}


def count(model: ModelConfig) -> int:
    """Counts parameters matrix by matrix, from the shapes in the paper."""
    dim, heads, kv_heads = model.embed_dim, model.num_heads, model.num_kv_heads
    attention = [
        dim * heads * model.head_dim,  # queries
        dim * kv_heads * model.head_dim,  # keys
        dim * kv_heads * model.head_dim,  # values
        heads * model.head_dim * dim,  # output
    ]
    feed_forward = [dim * model.ffn_dim] * (3 if model.activation == "swiglu" else 2)
    norms = [dim, dim]
    block = sum([*attention, *feed_forward, *norms])
    embeddings = [model.vocab_size * dim] * (1 if model.tie_embeddings else 2)
    return sum([*embeddings, model.num_blocks * block, dim])


def label(row: Row) -> str:
    model = row.model
    shape = f"{model.num_blocks}x{model.embed_dim}-{model.num_heads}-{model.num_kv_heads}"
    return f"table{row.tables[0]}-{row.group}-{shape}-{model.sharing}x{model.num_repeats}"


@pytest.mark.parametrize("size", MOBILELLM)
def test_published_totals_are_exact(size: str) -> None:
    assert count(MOBILELLM[size]) == PARAMETERS[size]


def test_layer_sharing_adds_depth_and_no_parameters() -> None:
    for size in ("125m", "350m"):
        plain, shared = MOBILELLM[size], MOBILELLM[f"ls_{size}"]
        assert shared == dataclasses.replace(plain, num_repeats=2)
        assert shared.applied_depth == 2 * plain.applied_depth


def test_the_default_model_is_125m() -> None:
    assert MOBILELLM["125m"] == ModelConfig()


@pytest.mark.parametrize("row", TABLE_ROWS, ids=label)
def test_row_has_the_printed_size(row: Row) -> None:
    # Table 1 prints whole millions. The other tables print tenths, and our rule fits to 0.11M.
    tolerance = 0.5 if row.tables == ("1",) else 0.11
    assert abs(count(row.model) / 1e6 - row.params_millions) <= tolerance


@pytest.mark.parametrize("row", TABLE_ROWS, ids=label)
def test_row_has_the_printed_average(row: Row) -> None:
    tasks = [row.scores[task] for task in TASKS if task != "average"]
    # The paper prints one decimal, and one of its averages is wrong by 0.06.
    assert sum(tasks) / len(tasks) == pytest.approx(row.scores["average"], abs=0.065)


@pytest.mark.parametrize("row", TABLE_ROWS, ids=label)
def test_heads_fill_the_width(row: Row) -> None:
    assert row.model.num_heads * row.model.head_dim == row.model.embed_dim


def test_rows_by_table_and_group() -> None:
    tables = ("1", "2", "10", "11", "12", "13", "14")
    counts = {table: len(rows(table)) for table in tables}
    assert counts == {"1": 3, "2": 8, "10": 16, "11": 19, "12": 19, "13": 30, "14": 8}
    assert len(rows()) == len(TABLE_ROWS) == 80
    assert len(rows("11", "125M")) == 9
    assert {row.group for row in rows(group="350M")} == {"350M"}


def test_only_table_12_has_question_answering() -> None:
    for row in TABLE_ROWS:
        names = (*TASKS, *QA_TASKS) if "12" in row.tables else TASKS
        assert tuple(row.scores) == names


def test_sharing_baselines_are_rows_of_table_13() -> None:
    for row in (r for r in rows("2") if r.model.num_repeats == 1):
        (twin,) = [r for r in rows("13", row.group) if r.model == row.model]
        assert twin.scores == row.scores


def test_repeat_counts_of_table_14() -> None:
    repeats = [row.model.num_repeats for row in rows("14", "350M")]
    assert sorted(repeats) == [1, 2, 3, 4]


def test_roadmap_ends_at_the_published_models() -> None:
    for group, size in (("125M", "125m"), ("350M", "350m")):
        steps = {row.step: row for row in rows("10", group)}
        assert steps["+ 1T tokens"].model == MOBILELLM[size]
        assert steps["+ layer sharing, 1T tokens"].model == MOBILELLM[f"ls_{size}"]
        assert steps["baseline: ReLU feed-forward"].model.activation == "relu"
        assert steps["+ 1T tokens"].tokens == 4 * steps["+ SwiGLU"].tokens == 10**12


@pytest.mark.parametrize("size", MOBILELLM)
def test_published_scores_have_their_average(size: str) -> None:
    scores = MOBILELLM_SCORES[size]
    assert tuple(scores)[: len(TASKS)] == TASKS
    tasks = [scores[task] for task in TASKS if task != "average"]
    assert sum(tasks) / len(tasks) == pytest.approx(scores["average"], abs=0.065)


def test_published_scores_equal_the_last_steps_of_the_roadmap() -> None:
    for group, size in (("125M", "125m"), ("350M", "350m")):
        steps = {row.step: row.scores for row in rows("10", group)}
        for step, name in (("+ 1T tokens", size), ("+ layer sharing, 1T tokens", f"ls_{size}")):
            published = {task: MOBILELLM_SCORES[name][task] for task in TASKS}
            assert published == steps[step]
    # We know only some figures of Table 4.
    assert MOBILELLM_SCORES["125m"]["triviaqa_f1_64shot"] == 12.5
    assert MOBILELLM_SCORES["ls_125m"].keys() - set(TASKS) == {
        "triviaqa_f1_1shot", "race_middle", "race_high"
    }  # fmt: skip
    assert MOBILELLM_SCORES["ls_350m"]["race_high"] == 33.7


def test_ffn_width() -> None:
    # LLaMA-7B has 4096 and 11008; the other widths come from the paper's config files.
    assert [ffn_width(dim) for dim in (4096, 576, 1280, 1600)] == [11008, 1536, 3584, 4352]
    assert ffn_width(768, "relu") == 3072
