"""The requests of our tasks equal strings written by hand, and the requests of the harness."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the eval extra")

import datasets
import lm_eval.api.task
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.loggers.utils import get_git_commit_hash
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.evaluate.task_data import GROUPS, TASK_DATA
from mobilellm_jax.evaluate.tasks import (
    _INSTALLED,
    as_json,
    format_results,
    load_tasks,
    quick_scores,
    run_tasks,
)
from tests.evaluate.example_rows import ASKED, write_rows


class Toy(LM):  # type: ignore[misc]
    """Records all requests; the likelihood of a text depends only on its characters."""

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
def test_the_first_row_of_every_task_asks_the_strings_written_by_hand(data_dir: Path) -> None:
    asked = ask([*ASKED, "triviaqa", "wikitext"], data_dir, limit=1).asked
    pairs = [request for request in asked if len(request) == 2 and isinstance(request[1], str)]
    assert pairs == [pair for task in ASKED for pair in ASKED[task]]
    [(context, settings)] = [request for request in asked if isinstance(request[-1], dict)]
    assert context == "Question: What is red?\nAnswer:"
    assert settings["until"] == ["\n", ".", ","] and not settings["do_sample"]
    [(page,)] = [request for request in asked if len(request) == 1]
    assert page == " = red =\nIt is a 1,000-fold <unk> colour .\n"


def test_examples_are_those_of_the_harness_own_local_files(data_dir: Path, tmp_path: Path) -> None:
    tasks = sorted(ASKED.keys() - {"race_high", "race_middle"})
    for task in tasks:
        data = TASK_DATA[task]
        files = data.files(data_dir, 3)
        splits = {"train": str(files["fewshot"]), data.scored: str(files[data.scored])}
        overlay = {
            "include": str(_INSTALLED / f"{data.harness_file}.yaml"),
            "task": f"theirs_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(tmp_path / "cache" / task)},
            **{"training_split": "train", "validation_split": None, "test_split": None},
            f"{data.scored}_split": data.scored,
            "num_fewshot": 3,
        }
        (tmp_path / f"{task}.yaml").write_text(json.dumps(overlay))
    theirs = Toy()
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = [f"theirs_{task}" for task in tasks]
    evaluator.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0)
    ours = ask(tasks, data_dir, shots=3)
    assert ours.asked == theirs.asked
    first = 0
    for task in tasks:
        context, continuation = ours.asked[first]
        assert context.endswith(f"\n\n{ASKED[task][0][0]}") or task == "winogrande"
        assert context.count("\n\n") == 3
        assert continuation == ASKED[task][0][1]
        first += 3 * len(ASKED[task])  # each task has three rows


def test_shots_of_a_name_and_of_the_flag(data_dir: Path) -> None:
    def examples(shots: int | None) -> list[int]:
        asked = ask(["triviaqa", "triviaqa_1shot"], data_dir, shots, limit=1).asked
        return [context.count("\n\n") for context, _ in asked]

    assert examples(None) == [0, 1]
    assert examples(2) == [2, 1]  # the name triviaqa_1shot fixes the number
    # RACE takes its examples from the scored articles, without the article in question.
    for context, _ in ask(["race_high"], data_dir, 2).asked:
        articles = [part for part in context.split("\n\n") if part.startswith("Article:")]
        assert len(set(articles)) == 3


def test_triviaqa_has_f1_and_exact_match(data_dir: Path) -> None:
    results = run_tasks(Toy(), load_tasks(["triviaqa"], data_dir=data_dir), None)["results"]
    found = {k.partition(",")[0]: v for k, v in results["triviaqa"].items() if "," in k}
    assert found["exact_match"] == 0
    # The row of blue scores 2/3 for "blue thing"; the other rows share no word with the answer.
    assert found["f1"] == pytest.approx(2 / 3 / 3)


def test_the_group_is_the_papers_table(data_dir: Path) -> None:
    names = [name for name in GROUPS["mobilellm"] if not name.endswith(("5shot", "64shot"))]
    tasks = load_tasks(["mobilellm_zero_shot", *names[8:]], data_dir=data_dir)
    assert list(tasks.loaded["tasks"]) == names
    results = run_tasks(Toy(), tasks, None)
    config = ModelConfig()
    table = format_results(results, config)
    for name in names:
        assert f"\n{name} " in table
    assert "average" in table and "Compare only models" in table
    assert json.loads(as_json(results))["results"].keys() == set(names)
    quick = quick_scores(Toy(), tasks)
    assert quick["piqa/acc"] == results["results"]["piqa"]["acc,none"]
    assert not [name for name in quick if "stderr" in name]


@pytest.mark.parametrize(
    ("names", "shots", "message"),
    [
        (["hellaswga"], None, "no task 'hellaswga'. Did you mean hellaswag?"),
        (["mobilelm"], None, "Did you mean mobilellm"),
        (["mmlu"], None, "has no task 'mmlu'"),
        ([], None, "--tasks is empty"),
        (["piqa"], 5, "fewshot.jsonl has 5 rows, and piqa with 5 examples needs at least 6"),
    ],
)
def test_wrong_tasks_are_refused(
    names: list[str], shots: int | None, message: str, data_dir: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(names, data_dir=data_dir, num_fewshot=shots)


@pytest.mark.soak  # the harness reads the files of all its tasks for 15 s
def test_a_name_that_the_harness_does_not_know() -> None:
    with pytest.raises(ValueError, match="no task 'hellaswagg'. Did you mean hellaswag"):
        load_tasks(["hellaswagg"])


def test_the_message_names_all_missing_files(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(
        (data_dir / "piqa" / "validation.jsonl").read_bytes()
    )
    with pytest.raises(FileNotFoundError) as caught:
        load_tasks(["piqa", "boolq", "hellaswag"], data_dir=tmp_path)
    message = str(caught.value)
    assert "leave the tasks out: --tasks=piqa." in message
    assert "boolq/validation.jsonl" in message and "hellaswag/validation.jsonl" in message


def test_the_message_for_a_wrong_row_names_file_and_line(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    lines = (data_dir / "piqa" / "validation.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"label": 1', '"label": 2')
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"piqa.validation.jsonl, line 2: label=2"):
        load_tasks(["piqa"], data_dir=tmp_path)


def test_names_and_settings_of_the_harness_are_restored(data_dir: Path) -> None:
    level, shown = logging.getLogger("lm_eval").level, datasets.is_progress_bar_enabled()
    ask(["piqa"], data_dir, limit=1)
    assert lm_eval.api.task.tqdm is tqdm
    assert evaluator.get_git_commit_hash is get_git_commit_hash
    assert (logging.getLogger("lm_eval").level, datasets.is_progress_bar_enabled()) == (
        level,
        shown,
    )
