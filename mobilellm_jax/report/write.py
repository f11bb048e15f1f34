"""Writes the report of runs as a page, and writes its tables and pictures as separate files."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mobilellm_jax
from mobilellm_jax.errors import require
from mobilellm_jax.paper.grids import ABOUT
from mobilellm_jax.report import figures
from mobilellm_jax.report.compare import Model, Table, count_verdicts, grid_tables, group_seeds
from mobilellm_jax.report.figures import Picture
from mobilellm_jax.report.page import Section, page
from mobilellm_jax.report.runs import Measured, read_runs
from mobilellm_jax.report.tables import grid_table, model_table, to_csv, to_markdown
from mobilellm_jax.storage import rundir

PAGE = "index.html"
_READING = (
    "Loss is the validation loss at the end of training in nats per token; lower is better. Each "
    "value is the mean over seeds, which set the initial weights and the order of the data. SE is "
    "the standard error of the mean.",
    "The difference is the loss of a row minus the loss of its reference row, taken seed by seed; "
    "a negative difference is better. The roadmap compares each step with the step before it. "
    "Every other table compares its rows with one reference row, which has no difference.",
    "The paper's score is the mean accuracy in percent on eight zero-shot tasks of the paper's "
    "row that our row stands for; higher is better. The paper's difference is taken the same way.",
    "Direction: 'same direction' or 'opposite' if the 95% interval of our difference (Student's "
    "t) does not contain zero, and 'within the spread' if it does. 'of one seed' tells no "
    "direction.",
)
_CAVEATS = (
    "Loss on a held-out text is not accuracy on tasks. The paper trains on 0.25 to 1 trillion "
    "tokens. Models of a few million parameters on a few million tokens may rank differently, and "
    "agreement on this page does not prove the paper's results.",
    "The paper gives one run per row and no spread. Two of its models differ only in having 14 or "
    "16 heads and are 1.6 points apart (Tables 11 and 13, 8 blocks). Most of its differences "
    "below one point may therefore be noise.",
    "The 125M baseline of Table 10 equals OPT-125M of Table 3 in all eight tasks. Its step to "
    "SwiGLU may therefore compare models that were trained on different data.",
    "With few seeds an interval is wide: with three seeds it is 4.3 standard errors to each side. "
    "One comparison in twenty excludes zero by chance.",
    "One learning rate for all shapes may favour some shapes. If rates were tuned, on the same "
    "validation text, the table shows the rate of each row.",
)
_LEAD = (
    "The paper MobileLLM (Liu et al. 2024, arXiv:2402.14905) compares small language models that "
    "differ in one thing: depth against width, kinds of attention heads, shared embeddings, "
    "shared layers. This page repeats those comparisons{} and shows the paper's numbers beside "
    "them."
)
_NAMES = (
    "A name gives blocks x width, heads and key-value heads (h, kv), the width of the "
    "feed-forward layer (f), and further settings."
)


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
    sections = _sections(runs, models, tables)
    for section in sections:
        if section.table is not None:
            file = output / section.table.name
            rundir.write_whole(file.with_name(f"{file.name}.csv"), to_csv(section.table))
            rundir.write_whole(file.with_name(f"{file.name}.md"), to_markdown(section.table))
        for picture in section.pictures:
            rundir.write_whole(output / f"{picture.name}.png", picture.light)
    title = "MobileLLM's ablations, trained again" if tables else "Models compared"
    command = ["mobilellm", "report", f"--runs={pattern}", f"--output={output}"]
    made = (
        f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by mobilellm-jax {mobilellm_jax.__version__}: "
        f"{shlex.join(command)} with Python {sys.version.split()[0]}."
    )
    rundir.write_whole(output / PAGE, page(title, _lead(models, tables), sections, made))
    finished = sum(len(model.runs) for model in models)
    lines = [f"{len(models)} models of {finished} finished runs, {len(tables)} grids"]
    if finished < len(runs):
        lines.append(
            f"{len(runs) - finished} runs have no loss at their last step and are in no table; "
            "the page lists them"
        )
    return [*lines, str(output / PAGE)]


def _sections(
    runs: Sequence[Measured], models: Sequence[Model], tables: Sequence[Table]
) -> list[Section]:
    sections = []
    if tables:
        sections.append(Section(anchor="reading", title="How to read it", bullets=_READING))
        sections.append(Section(anchor="caveats", title="What it does not show", bullets=_CAVEATS))
    sections += [_grid_section(number, table) for number, table in enumerate(tables, start=1)]
    if models:
        table = model_table(models)
        sections.append(
            Section(
                anchor="models",
                title=table.title,
                paragraphs=(_NAMES,),
                table=table,
                pictures=tuple(_pictures_of_all(models, with_curves=not tables)),
            )
        )
    unfinished = tuple(_unfinished_line(run) for run in runs if not run.is_finished)
    if unfinished:
        sections.append(Section(anchor="unfinished", title="Not finished", bullets=unfinished))
    return sections


def _grid_section(number: int, table: Table) -> Section:
    name = f"{number}-{table.grid}"
    labelled = [(row.row.label, row.model) for row in table.rows]
    pictures = [figures.curves(f"{name}-curves", labelled)]
    if table.grid == "depth_width":
        pictures.append(figures.depth(f"{name}-depth", table))
    paragraphs = [ABOUT[table.grid].question, _verdict_line([table])]
    if table.missing:
        paragraphs.append(f"Not run or not finished: {'; '.join(table.missing)}.")
    text = grid_table(table, name)
    return Section(
        anchor=name,
        title=text.title,
        paragraphs=tuple(filter(None, paragraphs)),
        table=text,
        pictures=tuple(pictures),
    )


def _pictures_of_all(models: Sequence[Model], with_curves: bool) -> list[Picture]:
    pictures = []
    if with_curves:
        pictures.append(figures.curves("curves", [(model.name, model) for model in models]))
    if any(model.tokens_per_sec for model in models):
        pictures.append(figures.speed(models))
    if any(model.peak_bytes for model in models):
        pictures.append(figures.memory(models))
    return pictures


def _lead(models: Sequence[Model], tables: Sequence[Table]) -> list[str]:
    if not models:
        return ["No run has finished yet."]
    lead = []
    if tables:
        is_paper_scale = {table.scale for table in tables} == {"paper"}
        lead.append(_LEAD.format("" if is_paper_scale else " with much smaller models"))
    seeds = sorted({len(model.runs) for model in models})
    data = sorted({Path(model.config.data.path).name for model in models})
    lead.append(
        f"{len(models)} models of {_millions([model.parameters for model in models])} parameters, "
        f"{_millions([model.tokens for model in models])} tokens each, "
        f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'}, on "
        f"{', '.join(data)}."
    )
    return [text for text in (*lead, _verdict_line(tables)) if text]


def _millions(values: Sequence[int]) -> str:
    low, high = (f"{value / 1e6:,.2f}" for value in (min(values), max(values)))
    return f"{low} million" if low == high else f"{low} to {high} million"


def _verdict_line(tables: Sequence[Table]) -> str:
    counts = count_verdicts(tables)
    parts = [f"{number} {verdict}" for verdict, number in counts.most_common()]
    if not parts:
        return ""
    return f"Differences beside the paper's: {counts.total()}, of which {', '.join(parts)}."


def _unfinished_line(run: Measured) -> str:
    state = "under way or stopped"
    if run.failed:
        state = f"failed: {run.failed.splitlines()[0]}"
    elif run.has_diverged:
        state = "diverged: its validation loss is not finite"
    return f"{run.folder.name}, step {run.last_step} of {run.config.train.steps}, {state}"
