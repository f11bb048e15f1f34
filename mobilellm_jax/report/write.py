"""Writes the report of runs as a page, and writes its tables and pictures as separate files."""

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mobilellm_jax
from mobilellm_jax.errors import require
from mobilellm_jax.report.compare import Model, grid_tables, group_seeds
from mobilellm_jax.report.page import page
from mobilellm_jax.report.runs import Measured, Unreadable, read_runs
from mobilellm_jax.report.sections import (
    grid_section,
    model_section,
    to_csv,
    to_markdown,
    verdict_line,
)
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.outputs import MODEL_FILES, own_folder

PAGE = "index.html"

_log = logging.getLogger(__name__)


def write_report(pattern: str, output: Path) -> list[str]:
    """Writes the page, its pictures and its tables into `output`; returns messages for the user.

    Raises:
      UserError: if the `report` extra is not installed.
      ConfigError: if no run folder matches the pattern, or none of them can be read.
    """
    for package in ("jinja2", "matplotlib", "scipy"):
        require(package, "report", "mobilellm report")
    folder = own_folder("--output", output, "a report", _is_report, (PAGE, *MODEL_FILES))
    runs, unreadable = read_runs(pattern)
    for each in unreadable:
        _log.warning(f"Left out: {each.reason}")
    models = group_seeds(runs)
    tables = grid_tables(models)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [grid_section(number, table) for number, table in enumerate(tables, start=1)]
    if models:
        sections.append(model_section(models, with_curves=not tables))
    for section in sections:
        rundir.write_whole(folder / f"{section.name}.csv", to_csv(section.rows))
        rundir.write_whole(folder / f"{section.name}.md", to_markdown(section.rows))
        for picture in section.pictures:
            rundir.write_whole(folder / f"{picture.name}.png", picture.light)
    others = [_unfinished_line(run) for run in runs if not run.is_finished]
    lines = [_summary(models, len(runs) - len(others), len(tables))]
    if others or unreadable:
        lines.append(
            f"{counted(len(others) + len(unreadable), 'folder')} without a finished run in no "
            "table; the page lists them"
        )
    command = ["mobilellm", "report", f"--runs={pattern}", f"--output={output}"]
    text = page(
        title=_title(models, with_grids=bool(tables)),
        with_grids=bool(tables),
        smaller=any(table.scale != "paper" for table in tables),
        lead=list(filter(None, [_models_line(models), verdict_line(tables)])),
        sections=sections,
        unfinished=[*others, *map(_unreadable_line, unreadable)],
        made=f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by mobilellm-jax "
        f"{mobilellm_jax.__version__}: {shlex.join(command)} with Python {sys.version.split()[0]}.",
    )
    rundir.write_whole(folder / PAGE, text)
    return [*lines, str(output / PAGE)]


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and "by mobilellm-jax" in page.read_text("utf-8", errors="replace")


def _title(models: Sequence[Model], *, with_grids: bool) -> str:
    if with_grids:
        return "MobileLLM's ablations, trained again"
    return {0: "No finished run", 1: "One model"}.get(len(models), "Models compared")


def _summary(models: Sequence[Model], finished: int, grids: int) -> str:
    text = f"{counted(len(models), 'model')} of {counted(finished, 'finished run')}"
    return f"{text}, {counted(grids, 'table')} next to the paper's" if grids else text


def _models_line(models: Sequence[Model]) -> str:
    if not models:
        return "No run has finished yet."
    seeds = sorted({len(model.runs) for model in models})
    data = sorted({_data_name(model.config.data.path) for model in models})
    return (
        f"{counted(len(models), 'model')} of "
        f"{_millions([model.parameters for model in models])} parameters, "
        f"{_millions([model.config.tokens for model in models])} tokens"
        f"{' each' if len(models) > 1 else ''}, "
        f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'}, on "
        f"{', '.join(data)}."
    )


def _data_name(path: str) -> str:
    """Returns `data.path` without parent folders; a mixture names several folders."""
    return ",".join(Path(part).name for part in path.split(","))


def _millions(values: Sequence[int]) -> str:
    low, high = (f"{value / 1e6:,.2f}" for value in (min(values), max(values)))
    return f"{low} million" if low == high else f"{low} to {high} million"


def _unfinished_line(run: Measured) -> str:
    if run.state == "imported":
        return f"{run.folder.name}, imported: this program did not train it"
    state = "under way or stopped"
    if run.state == "failed":
        state = f"failed: {run.failed.splitlines()[0]}"
    elif run.state == "diverged":
        state = "diverged: its validation loss is not finite"
    return f"{run.folder.name}, step {run.last_step} of {run.config.train.steps}, {state}"


def _unreadable_line(folder: Unreadable) -> str:
    return f"{folder.folder.name}, not read: {folder.reason}"
