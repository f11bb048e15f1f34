"""What the tasks ask, beside strings written by hand and beside the harness' own way to rows."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the eval extra")

import datasets
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.evaluate.task_data import GROUPS, TASK_DATA
from mobilellm_jax.evaluate.tasks import (
    _FILES,
    _INSTALLED,
    as_json,
    format_results,
    load_tasks,
    quick_scores,
    run_tasks,
)
from tests.evaluate.example_rows import ASKED, write_rows


class Toy(LM):  # type: ignore[misc]
    """Remembers what it is asked; a text's likelihood follows from its characters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-(sum(map(ord, "".join(r.args))) % 97) / 10, False) for r in requests]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        self.asked += [request.args for request in requests]
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return [" the blue thing" for _ in requests]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evals")
    write_rows(folder)
    return folder


def ask(
    names: list[str], data_dir: Path, shots: int | None = None, limit: int | None = None
) -> Toy:
    model = Toy()
    run_tasks(model, load_tasks(names, data_dir=data_dir, num_fewshot=shots), limit)
    return model


@pytest.mark.golden
def test_the_first_row_of_every_task_asks_what_stands_written(data_dir: Path) -> None:
    for task, expected in ASKED.items():
        assert ask([task], data_dir, limit=1).asked == expected, task
    [(context, settings)] = ask(["triviaqa"], data_dir, limit=1).asked
    assert context == "Question: What is red?\nAnswer:"
    assert settings["until"] == ["\n", ".", ","] and not settings["do_sample"]
    [(page,)] = ask(["wikitext"], data_dir, limit=1).asked
    assert page == " = red =\nIt is a 1,000-fold <unk> colour .\n"


@pytest.mark.parametrize("task", sorted(ASKED.keys() - {"race_high", "race_middle"}))
def test_examples_are_those_of_the_harness_own_local_files(
    task: str, data_dir: Path, tmp_path: Path
) -> None:
    data = TASK_DATA[task]
    files = data.files(data_dir, 3)
    splits = {"train": str(files["fewshot"]), data.scored: str(files[data.scored])}
    overlay = {
        "include": str(_INSTALLED / _FILES[task]),
        "task": "theirs",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(tmp_path / "cache")},
        **{"training_split": "train", "validation_split": None, "test_split": None},
        f"{data.scored}_split": data.scored,
        "num_fewshot": 3,
    }
    (tmp_path / "theirs.yaml").write_text(json.dumps(overlay))
    theirs = Toy()
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    evaluator.simple_evaluate(theirs, tasks=["theirs"], task_manager=manager, bootstrap_iters=0)
    ours = ask([task], data_dir, shots=3)
    assert ours.asked == theirs.asked
    context, continuation = ours.asked[0]
    assert context.endswith(f"\n\n{ASKED[task][0][0]}") or task == "winogrande"
    assert context.count("\n\n") == 3
    assert continuation == ASKED[task][0][1]


def test_shots_of_a_name_and_of_the_flag(data_dir: Path) -> None:
    def examples(names: list[str], shots: int | None) -> int:
        return ask(names, data_dir, shots, limit=1).asked[0][0].count("\n\n")

    assert examples(["triviaqa"], None) == 0
    assert examples(["triviaqa"], 2) == 2
    assert examples(["triviaqa_1shot"], None) == 1
    assert examples(["triviaqa_1shot"], 2) == 1  # the name says it
    # RACE's examples are articles that are scored too, and never the one that is asked about.
    for context, _ in ask(["race_high"], data_dir, 2).asked:
        articles = [part for part in context.split("\n\n") if part.startswith("Article:")]
        assert len(set(articles)) == 3


def test_triviaqa_has_f1_and_exact_match(data_dir: Path) -> None:
    results = run_tasks(Toy(), load_tasks(["triviaqa"], data_dir=data_dir), None)["results"]
    found = {k.partition(",")[0]: v for k, v in results["triviaqa"].items() if "," in k}
    assert found["exact_match"] == 0
    # "blue thing" beside "Blue", "blue": 2/3 in the row of blue; "a colour" shares nothing.
    assert found["f1"] == pytest.approx(2 / 3 / 3)


def test_the_group_is_the_papers_table(data_dir: Path) -> None:
    names = [name for name in GROUPS["mobilellm"] if not name.endswith(("5shot", "64shot"))]
    tasks = load_tasks(["mobilellm_zero_shot", *names[8:]], data_dir=data_dir)
    assert tasks.names == tuple(names)
    results = run_tasks(Toy(), tasks, None)
    config = ModelConfig()
    table = format_results(results, config)
    for name in names:
        assert f"\n{name} " in table
    assert "average" in table and "compare differences" in table
    assert json.loads(as_json(results))["results"].keys() == set(names)
    quick = quick_scores(Toy(), tasks)
    assert quick["piqa/acc"] == results["results"]["piqa"]["acc,none"]
    assert not [name for name in quick if "stderr" in name]


@pytest.mark.parametrize(
    ("names", "shots", "message"),
    [
        (["hellaswga"], None, "no task 'hellaswga'. Did you mean hellaswag?"),
        (["mobilelm"], None, "Did you mean mobilellm"),
        (["mmlu"], None, "serves no task 'mmlu'"),
        ([], None, "--tasks is empty"),
        (["piqa"], 5, "fewshot.jsonl has 5 rows, and piqa with 5 examples needs at least 6"),
    ],
)
def test_tasks_that_cannot_be_asked(
    names: list[str], shots: int | None, message: str, data_dir: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(names, data_dir=data_dir, num_fewshot=shots)


def test_a_name_that_the_harness_does_not_know() -> None:
    with pytest.raises(ValueError, match="no task 'hellaswagg'. Did you mean hellaswag"):
        load_tasks(["hellaswagg"])


def test_files_that_are_missing_are_named_together(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(
        (data_dir / "piqa" / "validation.jsonl").read_bytes()
    )
    with pytest.raises(FileNotFoundError) as caught:
        load_tasks(["piqa", "boolq", "hellaswag"], data_dir=tmp_path)
    message = str(caught.value)
    assert "leave the tasks out: --tasks=piqa." in message
    assert "boolq/validation.jsonl" in message and "hellaswag/validation.jsonl" in message


def test_a_damaged_row_is_named_by_file_and_line(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    lines = (data_dir / "piqa" / "validation.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"label": 1', '"label": 2')
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"piqa.validation.jsonl, line 2 has label=2"):
        load_tasks(["piqa"], data_dir=tmp_path)


def test_the_harness_is_left_as_it_was(data_dir: Path) -> None:
    before = logging.getLogger("lm_eval").level, datasets.is_progress_bar_enabled()
    ask(["piqa"], data_dir)
    assert (logging.getLogger("lm_eval").level, datasets.is_progress_bar_enabled()) == before
