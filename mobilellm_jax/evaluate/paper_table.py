"""Formats our scores next to the scores in the paper's Tables 3, 4 and 8."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.evaluate.task_data import QUESTIONS, TASK_DATA, ZERO_SHOT
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.architectures import MOBILELLM, MOBILELLM_SCORES

CAVEAT = """\
The paper does not say which harness, prompts or kind of accuracy it used, and the ARC-c of its
models is known to be 5 to 6 points lower here. Compare only models that were measured in the same
way, and do not compare these figures with the paper's."""
_SUBSET = """\
A subset of the published rows was scored (see the column `rows`); say so when you quote a score."""
_AVERAGE = "The average of acc_norm uses acc for a task without acc_norm."

# The name of a task in `MOBILELLM_SCORES`, if it differs from ours.
_COLUMNS = {
    "social_iqa": "siqa",
    "triviaqa_1shot": "triviaqa_f1_1shot",
    "triviaqa_5shot": "triviaqa_f1_5shot",
    "triviaqa_64shot": "triviaqa_f1_64shot",
}
_SHAPE = (
    *("embed_dim", "num_blocks", "num_repeats", "sharing", "num_heads", "num_kv_heads"),
    *("ffn_dim", "activation", "tie_embeddings"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """The scores of one task in percent, and their standard errors if the harness has them."""

    task: str
    shots: int
    rows: int
    percent: dict[str, float]  # The keys are METRIC and METRIC_stderr.
    paper: float | None  # The paper's accuracy; for TriviaQA, its F1.


def paper_lines(results: Mapping[str, Any], size: str) -> list[Line]:
    """Returns one line for each task of the paper in `results`, in the paper's order.

    `results` is what `tasks.run_tasks` returns. `size` is a key of `MOBILELLM` and chooses the
    paper's model.
    """
    lines = []
    for task in (*ZERO_SHOT, *QUESTIONS):
        found = results["results"].get(task)
        if found is None:
            continue
        values = {k.partition(",")[0]: v for k, v in found.items() if "," in k}
        lines.append(
            Line(
                task=task,
                shots=results["n-shot"][task],
                rows=results["n-samples"][task]["effective"],
                percent={k: 100 * v for k, v in values.items() if isinstance(v, float)},
                paper=MOBILELLM_SCORES[size].get(_COLUMNS.get(task, task)),
            )
        )
    return lines


def averages(lines: list[Line]) -> dict[str, float]:
    """Returns the mean scores of the eight zero-shot tasks, or {} if one task is missing."""
    eight = {line.task: line.percent for line in lines if line.task in ZERO_SHOT}
    if len(eight) < len(ZERO_SHOT):
        return {}
    acc = [scores["acc"] for scores in eight.values()]
    acc_norm = [scores.get("acc_norm", scores["acc"]) for scores in eight.values()]
    return {"acc": statistics.fmean(acc), "acc_norm": statistics.fmean(acc_norm)}


def nearest_size(config: ModelConfig) -> tuple[str, bool]:
    """Returns the size of the nearest model in the paper, and whether the shapes are equal."""
    for size, model in MOBILELLM.items():
        if all(getattr(model, field) == getattr(config, field) for field in _SHAPE):
            return size, True
    ours = parameter_count(config)
    plain = [size for size in MOBILELLM if not size.startswith("ls_")]
    return min(plain, key=lambda size: abs(parameter_count(MOBILELLM[size]) - ours)), False


def paper_name(size: str) -> str:
    """Returns the name that the paper gives the model.

    >>> [paper_name(size) for size in ("125m", "1_5b", "ls_350m")]
    ['MobileLLM-125M', 'MobileLLM-1.5B', 'MobileLLM-LS-350M']
    """
    return "MobileLLM-" + size.replace("ls_", "LS-").replace("_", ".").upper()


def format_table(results: Mapping[str, Any], config: ModelConfig) -> str:
    """Returns the table as text, or "" if `results` has no task of the paper."""
    size, is_it = nearest_size(config)
    lines = paper_lines(results, size)
    if not lines:
        return ""
    text = [
        f"In percent, with standard errors, by lm-evaluation-harness {results['lm_eval_version']}.",
        f"paper: the paper's figures for {paper_name(size)}, "
        + ("which has this model's shape." if is_it else "which is nearest in size."),
    ]
    eight = [line for line in lines if line.task in ZERO_SHOT]
    mean = averages(lines)
    if eight:
        text += ["", _head("acc", "acc_norm", "paper")]
        text += [_format(line, "acc", "acc_norm") for line in eight]
    if mean:
        paper = MOBILELLM_SCORES[size]["average"]
        cells = [f"{mean['acc']:6.2f}", f"{mean['acc_norm']:6.2f}"]
        text.append(f"{'average':<16}{'':5}{'':17}{cells[0]:<15}{cells[1]:<15}{paper:5.1f}")
    for names, first, second, paper_column in (
        ("triviaqa", "F1", "exact match", "paper (F1)"),
        ("race", "acc", "", "paper"),
    ):
        some = [line for line in lines if line.task.startswith(names)]
        if some:
            text += ["", _head(first, second, paper_column)]
            text += [_format(line, first.lower(), second.replace(" ", "_")) for line in some]
    notes = [CAVEAT]
    if any(line.rows < TASK_DATA[line.task].full_rows for line in lines):
        notes.insert(0, _SUBSET)
    if mean:
        notes.insert(0, _AVERAGE)
    return "\n".join([*text, "", *notes]) + "\n"


def _head(first: str, second: str, paper: str) -> str:
    return f"{'':<16}{'shots':>5}{'rows':>15}  {first:<15}{second:<15}{paper}"


def _format(line: Line, first: str, second: str) -> str:
    rows = f"{line.rows} of {TASK_DATA[line.task].full_rows}"
    paper = "" if line.paper is None else f"{line.paper:5.1f}"
    cells = f"{_cell(line, first):<15}{_cell(line, second):<15}{paper}"
    return f"{line.task:<16}{line.shots:>5}{rows:>15}  {cells}".rstrip()


def _cell(line: Line, metric: str) -> str:
    if metric not in line.percent:
        return ""
    error = line.percent.get(f"{metric}_stderr")
    return f"{line.percent[metric]:6.2f}" + ("" if error is None else f" \u00b1 {error:.2f}")
