import dataclasses
import statistics

import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.evaluate.paper_table import (
    CAVEAT,
    averages,
    format_table,
    nearest_size,
    paper_lines,
)
from mobilellm_jax.evaluate.task_data import QUESTIONS, TASK_DATA, ZERO_SHOT
from mobilellm_jax.paper.architectures import MOBILELLM, TASKS

ACC = [0.5, 0.25, 0.6, 0.7, 0.4, 0.3, 0.2, 0.55]
ACC_NORM = {"arc_easy": 0.45, "arc_challenge": 0.3, "piqa": 0.71, "hellaswag": 0.35}


def results(*tasks: str, rows: int | None = None) -> dict[str, object]:
    """Returns results in the harness' layout."""
    found = {}
    for task in tasks:
        if task in ZERO_SHOT:
            acc = ACC[ZERO_SHOT.index(task)]
            values = {"acc,none": acc, "acc_stderr,none": 0.01}
            if task in ACC_NORM:
                values |= {"acc_norm,none": ACC_NORM[task], "acc_norm_stderr,none": 0.02}
        elif task.startswith("triviaqa"):
            values = {
                "exact_match,remove_whitespace": 0.1,
                "exact_match_stderr,remove_whitespace": "N/A",
                "f1,remove_whitespace": 0.15,
                "f1_stderr,remove_whitespace": 0.003,
            }
        else:
            values = {"acc,none": 0.375, "acc_stderr,none": 0.01}
        found[task] = {"alias": task, "sample_len": 7, **values}
    return {
        "results": found,
        "n-shot": {task: 5 if task == "triviaqa_5shot" else 0 for task in tasks},
        "n-samples": {task: {"effective": rows or TASK_DATA[task].full_rows} for task in tasks},
        "lm_eval_version": "0.4.13",
    }


def table(
    *tasks: str, rows: int | None = None, config: ModelConfig = MOBILELLM["125m"]
) -> list[str]:
    return format_table(results(*tasks, rows=rows), config).splitlines()


def test_the_table_has_our_scores_the_papers_scores_and_the_averages() -> None:
    lines = table(*reversed([*ZERO_SHOT, *QUESTIONS]))  # the table sorts the tasks
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert cells["arc_easy"] == "0 2376 of 2376 50.00 ± 1.00 45.00 ± 2.00 43.9".split()
    assert cells["social_iqa"] == "0 1954 of 1954 40.00 ± 1.00 42.4".split()
    acc_norm = [ACC_NORM.get(t, a) for t, a in zip(ZERO_SHOT, ACC, strict=True)]
    acc = 100 * statistics.mean(ACC)
    assert cells["average"] == [f"{acc:.2f}", f"{100 * statistics.mean(acc_norm):.2f}", "46.3"]
    assert cells["triviaqa_5shot"] == "5 17944 of 17944 15.00 ± 0.30 10.00 14.3".split()
    assert cells["race_high"] == "0 1045 of 1045 37.50 ± 1.00 28.9".split()
    shown = [line.split()[0] for line in lines if line]
    tasks = [t for t in shown if t in TASK_DATA or t == "average"]
    assert tasks == [*ZERO_SHOT, "average", *QUESTIONS]
    assert "\n".join(lines[-3:]) == CAVEAT
    assert (
        lines[1] == "paper: the paper's figures for MobileLLM-125M, which has this model's shape."
    )
    assert max(map(len, lines)) <= 100


def test_columns_stand_under_their_heads() -> None:
    lines = table(*ZERO_SHOT)
    [head] = [line for line in lines if "shots" in line]
    [row] = [line for line in lines if line.startswith("hellaswag")]
    for column, cell in (("acc ", " 30.00 ±"), ("acc_norm", " 35.00 ±"), ("paper", " 38.9")):
        assert head.index(column) == row.index(cell)
    [mean] = [line for line in lines if line.startswith("average")]
    assert mean.index("43.75") == row.index("30.00") and mean.index("46.3") == row.index("38.9")


def test_fewer_than_eight_tasks_have_no_average() -> None:
    assert averages(paper_lines(results(*ZERO_SHOT[1:]), "125m")) == {}
    assert not any(line.startswith("average") for line in table(*ZERO_SHOT[1:], "race_high"))


def test_the_table_says_if_a_subset_was_scored() -> None:
    assert not any("subset" in line for line in table("boolq"))
    lines = table("boolq", rows=100)
    assert any("100 of 3270" in line for line in lines)
    assert any("A subset of the published rows" in line for line in lines)


def test_other_tasks_have_no_table() -> None:
    other = results("arc_easy")
    other["results"] = {"mmlu": {"acc,none": 0.3}}
    assert format_table(other, ModelConfig()) == ""


def test_a_figure_that_the_paper_lacks_is_left_empty() -> None:
    lines = table("triviaqa_5shot", config=MOBILELLM["ls_125m"])
    [line] = [line for line in lines if line.startswith("triviaqa_5shot")]
    assert line.endswith(" 10.00")


@pytest.mark.parametrize("size", MOBILELLM)
def test_every_model_of_the_paper_finds_its_row(size: str) -> None:
    # Vocabulary and context length may differ, because they do not change the shape.
    config = dataclasses.replace(MOBILELLM[size], vocab_size=50_000, max_seq_len=4096)
    assert nearest_size(config) == (size, True)
    assert len(paper_lines(results(*ZERO_SHOT), size)) == len(TASKS) - 1


def test_another_model_gets_the_nearest_in_size() -> None:
    config = ModelConfig()
    assert nearest_size(dataclasses.replace(config, num_blocks=3)) == ("125m", False)
    assert nearest_size(dataclasses.replace(config, num_blocks=100)) == ("350m", False)
    lines = table("boolq", config=dataclasses.replace(config, num_blocks=3))
    assert lines[1] == "paper: the paper's figures for MobileLLM-125M, which is nearest in size."
