"""Loads and runs tasks of lm-evaluation-harness (the `eval` extra).

For each task of `TASK_DATA`, we write a task file that includes the harness' own file. The prompts,
choices and metrics come from the harness' file. Our file adds the local rows (`--data_dir`), the
number of examples if the task's name contains this number, the F1 of TriviaQA, and the
middle-school half of RACE. Other tasks of the harness run unchanged.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.metrics
import lm_eval.api.task
import pyarrow
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig, near_miss
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.evaluate.harness import HarnessModel, writing_settings
from mobilellm_jax.evaluate.paper_table import format_table
from mobilellm_jax.evaluate.perplexity import exp
from mobilellm_jax.evaluate.task_data import FEWSHOT, GROUPS, TASK_DATA, read_rows
from mobilellm_jax.storage import file_kind, strict_json

_HERE = __name__
_RUN_CODE = "HF_ALLOW_CODE_EVAL"  # The harness' metric for programs reads this variable too.
_INSTALLED = Path(lm_eval.__file__).parent / "tasks"


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks with their rows."""

    loaded: Any  # Dict of tasks and groups, as the harness loads them.
    manager: TaskManager


def load_tasks(
    names: Sequence[str], *, data_dir: Path | None = None, num_fewshot: int | None = None
) -> Tasks:
    """Loads tasks and their rows.

    Args:
      names: Names of tasks or groups. `TASK_DATA` and `GROUPS` list ours.
      data_dir: Folder of local rows (`task_data.py`). If None, the harness downloads missing rows.
      num_fewshot: Number of examples before each question, unless the task's name fixes it. If
        None, the harness' number is used, which is zero for most tasks.

    Raises:
      UserError: if a name is not a task (the message suggests similar names), or a row is wrong.
      MissingFileError: if a file of rows is missing.
    """
    wanted = tuple(dict.fromkeys(t for name in names for t in GROUPS.get(name, (name,))))
    if not wanted:
        raise UserError("--tasks is empty; name a task, or a group such as mobilellm.")
    foreign = [name for name in wanted if name not in TASK_DATA]
    if foreign and data_dir is not None:
        raise UserError(
            f"--tasks: --data_dir has no task {foreign[0]!r}."
            f"{near_miss(foreign[0], [*GROUPS, *TASK_DATA])} The tasks with local rows are "
            f"{', '.join([*GROUPS, *TASK_DATA])}."
        )
    if data_dir is not None:
        _check_rows(wanted, data_dir, num_fewshot)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for name in wanted:
            if name in TASK_DATA:
                overlay = _overlay(name, data_dir, _shots(name, num_fewshot))
                (Path(folder) / f"{name}.yaml").write_text(overlay, "utf-8")
        # Searching the harness' thousands of task files takes seconds, so we avoid this if we can.
        manager = TaskManager(include_path=folder, include_defaults=bool(foreign))
        unknown = [name for name in foreign if name not in manager.all_tasks]
        if unknown:
            known = [*GROUPS, *TASK_DATA, *manager.all_tasks]
            raise UserError(
                f"--tasks: lm-evaluation-harness has no task {unknown[0]!r}."
                f"{near_miss(unknown[0], known)} Ours are {', '.join([*GROUPS, *TASK_DATA])}."
            )
        try:
            loaded = manager.load(list(wanted))
        except OSError as error:  # The libraries of the harness also raise it without a network.
            remedy = "check the network and the free space"
            if not foreign:
                remedy += ", or read local files with --data_dir=DIR"
            raise UserError(
                f"--tasks={','.join(wanted)}: the harness cannot download what it needs; {remedy}: "
                f"{error}"
            ) from error
    for name, task in loaded["tasks"].items():
        given = task.get_config("num_fewshot")
        # A task file sets this number to 0 if the task must not have examples.
        fixed = name in TASK_DATA and TASK_DATA[name].shots is not None
        if not fixed and given != 0:
            shots = given if num_fewshot is None else num_fewshot
            task.set_config("num_fewshot", shots or 0)
    return Tasks(loaded, manager)


def check_tasks(tasks: Tasks, config: ModelConfig, *, draws: bool) -> None:
    """Refuses tasks that the model cannot serve, before it computes anything.

    The first document of each task shows which texts the task asks for. `draws` says whether the
    engine can sample texts.

    Raises:
      UserError: if a task asks for texts with unsupported settings, or runs the model's programs.
    """
    with _quiet():
        for name, task in tasks.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not _may_run_code():
                raise UserError(
                    f"The task {name} runs the programs that the model writes on this machine; set "
                    f"{_RUN_CODE}=1 in the environment to allow this, or leave the task out."
                )
            task.build_all_requests(limit=1)
            for request in task.instances:
                if request.request_type == "generate_until":
                    writing_settings(request, config, draws)


def _may_run_code() -> bool:
    return os.environ.get(_RUN_CODE) == "1"


def quick_scores(model: HarnessModel, tasks: Tasks, limit: int | None = None) -> dict[str, float]:
    """Returns a dict from "TASK/METRIC" to the value of the metric, without standard errors."""
    with _quiet():
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # Every call draws the same examples.
        results = evaluator.evaluate(
            model, tasks.loaded, limit=limit, log_samples=False, bootstrap_iters=0
        )
    return {
        f"{task}/{metric.partition(',')[0]}": value
        for task, values in results["results"].items()
        for metric, value in values.items()
        if "," in metric and isinstance(value, float)
    }


def run_tasks(model: LM, tasks: Tasks, limit: int | None = None) -> dict[str, Any]:
    """Scores `limit` rows of each task (None: all), and returns the harness' results."""
    loaded = tasks.loaded
    if isinstance(model, HarnessModel):
        check_tasks(tasks, model.config, draws=model.draws)
    below = {name for members in loaded["group_map"].values() for name in members}
    everything = {**loaded["groups"], **loaded["tasks"]}
    with _quiet():
        results: dict[str, Any] = evaluator.simple_evaluate(
            model,
            tasks=[each for name, each in everything.items() if name not in below],
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
            confirm_run_unsafe_code=_may_run_code(),
        )
    return results


def format_results(results: Mapping[str, Any], config: ModelConfig) -> str:
    """Returns our table for the paper's tasks, and the harness' table for all other tasks."""
    others = {name: v for name, v in results["results"].items() if name not in GROUPS["mobilellm"]}
    parts = [format_table(results, config)]
    if others:
        parts.append(make_table({**results, "results": others}))
    return "\n".join(part for part in parts if part)


def as_json(results: Mapping[str, Any]) -> str:
    """Returns the results as JSON, as the harness itself would write them."""
    values = strict_json.with_null(results)
    return json.dumps(values, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def local_rows(task: str, data_dir: str, num_fewshot: int, **_: object) -> dict[str, Any]:
    """Returns the rows of a task by split; our task file makes the harness call this function."""
    data = TASK_DATA[task]
    files = data.files(Path(data_dir), num_fewshot)
    return {
        name: datasets.Dataset.from_list(alike(read_rows(file, data.check)))
        for name, file in files.items()
    }


def alike(values: list[Any]) -> list[Any]:
    """Returns the values; if the types in a column differ, its values become strings.

    A column of a `datasets.Dataset` has one type. In a user's file, a label or an unused column may
    be a number in some rows and a string in others.
    """
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, dict) for value in there):
        keys = dict.fromkeys(key for value in there for key in value)
        columns = {key: alike([value.get(key) for value in there]) for key in keys}
        rows = iter([{key: columns[key][i] for key in value} for i, value in enumerate(there)])
        return [None if value is None else next(rows) for value in values]
    if there and all(isinstance(value, list) for value in there):
        items = iter(alike([item for value in there for item in value]))
        return [
            None if value is None else list(itertools.islice(items, len(value))) for value in values
        ]
    try:
        pyarrow.array(there)
    except (pyarrow.ArrowException, OverflowError):
        return [
            value if value is None or isinstance(value, str) else json.dumps(value)
            for value in values
        ]
    return values


def _check_rows(names: Sequence[str], data_dir: Path, num_fewshot: int | None) -> None:
    if not data_dir.is_dir():
        raise MissingFileError(
            f"--data_dir={data_dir} is not a folder; `evaluate --help` describes it."
        )
    files = {name: TASK_DATA[name].files(data_dir, _shots(name, num_fewshot)) for name in names}
    missing = {name: [f for f in files[name].values() if not f.is_file()] for name in names}
    lines = [f"  {name}: {', '.join(map(_absent, gone))}" for name, gone in missing.items() if gone]
    if lines:
        there = ",".join(name for name in names if not missing[name])
        remedy = f"add them, or leave the tasks out: --tasks={there}" if there else "add them"
        raise MissingFileError(f"--data_dir={data_dir} lacks files; {remedy}.\n" + "\n".join(lines))
    for name in names:
        data, shots = TASK_DATA[name], _shots(name, num_fewshot)
        counts = {split: len(read_rows(f, data.check)) for split, f in files[name].items()}
        # The harness draws one more example than it shows, in case it draws the question itself.
        if shots and counts[data.fewshot] <= shots:
            raise UserError(
                f"{files[name][data.fewshot]} has {counts[data.fewshot]} rows, and {name} with "
                f"{shots} examples needs at least {shots + 1}; add rows, or lower --num_fewshot."
            )


def _absent(file: Path) -> str:
    return f"{file} {file_kind.absence(file)}" if file.is_symlink() else str(file)


def _shots(name: str, num_fewshot: int | None) -> int:
    fixed = TASK_DATA[name].shots
    return (num_fewshot or 0) if fixed is None else fixed


def _overlay(name: str, data_dir: Path | None, shots: int) -> str:
    data = TASK_DATA[name]
    file = _INSTALLED / f"{data.harness_file}.yaml"
    fields: dict[str, Any] = {"include": str(file), "task": name}
    functions = {}
    if data.shots is not None:
        fields["num_fewshot"] = shots
    if data.folder == "triviaqa":
        functions["process_results"] = "mobilellm_jax.evaluate.triviaqa.process_results"
        fields["metric_list"] = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("exact_match", "f1")
        ]
    if data.folder == "race":
        # Examples come from the scored split, but the scored article itself is never an example.
        fields |= {"dataset_name": name.removeprefix("race_"), "fewshot_split": "test"}
    if data_dir is not None:
        is_validation = data.scored == "validation"
        examples = FEWSHOT if shots and data.fewshot == FEWSHOT else None
        functions["custom_dataset"] = f"{_HERE}.{local_rows.__name__}"
        fields |= {
            "dataset_path": None,
            "dataset_name": None,
            "dataset_kwargs": {"task": name, "data_dir": str(data_dir), "num_fewshot": shots},
            "training_split": examples,
            "validation_split": data.scored if is_validation else None,
            "test_split": None if is_validation else data.scored,
            "fewshot_split": data.scored if data.fewshot == data.scored else None,
        }
    # Every JSON value is also a YAML value.
    lines = [f"{field}: {json.dumps(value)}" for field, value in fields.items()]
    lines += [f"{field}: !function {function}" for field, function in functions.items()]
    return "\n".join(lines) + "\n"


def _git_commit() -> str | None:
    """Returns the git commit, as the harness does, but prints no error outside a repository."""
    if shutil.which("git") is None:
        return None
    described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    return described.stdout.strip() or None


# Version 0.4.13 of lm_eval has no settings for these behaviours, so we replace three names. Remove
# a replacement when lm_eval has changed the behaviour.
# - Task.build_all_requests shows a progress bar even if the output is a file. See
#   github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/api/task.py#L332
# - get_git_commit_hash lets git print an error on stderr. See
#   github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/loggers/utils.py#L93
# - The aggregations of perplexities call math.exp, which raises an error above 709 nats. See
#   github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/api/metrics.py#L53
_REPLACED = (
    (lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=None)),
    (evaluator, "get_git_commit_hash", _git_commit),
    (lm_eval.api.metrics, "math", types.SimpleNamespace(**{**vars(math), "exp": exp})),
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness' warnings, and shows its progress bars only on a terminal."""
    logger = logging.getLogger("lm_eval")
    with contextlib.ExitStack() as originals:
        originals.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if datasets.is_progress_bar_enabled():
            originals.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        for module, name, ours in _REPLACED:
            originals.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, ours)
        yield
