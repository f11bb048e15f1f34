"""Writes the report of runs as a page, and writes its tables and pictures as separate files."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mobilellm_jax
from mobilellm_jax.errors import require
from mobilellm_jax.report.compare import Model, grid_tables, group_seeds
from mobilellm_jax.report.page import page
from mobilellm_jax.report.runs import Measured, read_runs
from mobilellm_jax.report.sections import (
    grid_section,
    model_section,
    to_csv,
    to_markdown,
    verdict_line,
)
from mobilellm_jax.storage import rundir

PAGE = "index.html"


def write_report(pattern: str, output: Path) -> list[str]:
    """Writes the page, its pictures and its tables into `output`; returns messages for the user.

    Raises:
      UserError: if the `report` extra is not installed.
      ConfigError: if no run folder matches the pattern.
    """
    for package in ("jinja2", "matplotlib", "scipy"):
        require(package, "report", "mobilellm report")
    runs = read_runs(pattern)
    models = group_seeds(runs)
    tables = grid_tables(models)
    output.mkdir(parents=True, exist_ok=True)
    sections = [grid_section(number, table) for number, table in enumerate(tables, start=1)]
    if models:
        sections.append(model_section(models, with_curves=not tables))
    for section in sections:
        rundir.write_whole(output / f"{section.name}.csv", to_csv(section.rows))
        rundir.write_whole(output / f"{section.name}.md", to_markdown(section.rows))
        for picture in section.pictures:
            rundir.write_whole(output / f"{picture.name}.png", picture.light)
    unfinished = [_unfinished_line(run) for run in runs if not run.is_finished]
    command = ["mobilellm", "report", f"--runs={pattern}", f"--output={output}"]
    text = page(
        title="MobileLLM's ablations, trained again" if tables else "Models compared",
        with_grids=bool(tables),
        smaller=any(table.scale != "paper" for table in tables),
        lead=list(filter(None, [_models_line(models), verdict_line(tables)])),
        sections=sections,
        unfinished=unfinished,
        made=f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by mobilellm-jax "
        f"{mobilellm_jax.__version__}: {shlex.join(command)} with Python {sys.version.split()[0]}.",
    )
    rundir.write_whole(output / PAGE, text)
    finished = len(runs) - len(unfinished)
    lines = [f"{len(models)} models of {finished} finished runs, {len(tables)} grids"]
    if unfinished:
        lines.append(
            f"{len(unfinished)} runs have no loss at their last step and are in no table; "
            "the page lists them"
        )
    return [*lines, str(output / PAGE)]


def _models_line(models: Sequence[Model]) -> str:
    if not models:
        return "No run has finished yet."
    seeds = sorted({len(model.runs) for model in models})
    data = sorted({Path(model.config.data.path).name for model in models})
    return (
        f"{len(models)} models of {_millions([model.parameters for model in models])} parameters, "
        f"{_millions([model.config.tokens for model in models])} tokens each, "
        f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'}, on "
        f"{', '.join(data)}."
    )


def _millions(values: Sequence[int]) -> str:
    low, high = (f"{value / 1e6:,.2f}" for value in (min(values), max(values)))
    return f"{low} million" if low == high else f"{low} to {high} million"


def _unfinished_line(run: Measured) -> str:
    state = "under way or stopped"
    if run.failed:
        state = f"failed: {run.failed.splitlines()[0]}"
    elif run.has_diverged:
        state = "diverged: its validation loss is not finite"
    return f"{run.folder.name}, step {run.last_step} of {run.config.train.steps}, {state}"
