"""From run folders to a page: curves, the paper's tables with ours beside them, what it cost.

`runs` reads folders, `compare` puts runs beside each other and beside the paper, `tables`,
`figures` and `page` show it.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mobilellm_jax
from mobilellm_jax.paper.grids import ABOUT, ScaleName
from mobilellm_jax.report import figures
from mobilellm_jax.report.compare import Model, Table, count_verdicts, grid_tables, group_seeds
from mobilellm_jax.report.figures import Picture
from mobilellm_jax.report.page import Section, page
from mobilellm_jax.report.runs import Measured, read_runs
from mobilellm_jax.report.tables import TextTable, grid_table, model_table, to_csv, to_markdown
from mobilellm_jax.storage import rundir

PAGE = "index.html"
_READING = (
    "Loss is the validation loss at the end of training in nats per token: the lower, the better. "
    "Each value is the mean over seeds (of initialisation and of the order of the data), SE its "
    "standard error.",
    "The difference is the loss of a row less that of the row it is compared with, seed by seed: "
    "below zero is better. The roadmap compares each step with the one before; every other table "
    "has one row that the rest are compared with, which has no difference.",
    "The paper's score is the mean accuracy in percent on eight zero-shot tasks of the row that "
    "ours stands for: the higher, the better. Its difference is taken the same way.",
    "Direction: 'same direction' or 'opposite' where a 95% interval of our difference (Student's "
    "t) leaves out zero, 'within the spread' where it does not; 'of one seed' tells no direction.",
)
_CAVEATS = (
    "Loss on a held-out text is not accuracy on tasks. What the paper reports is trained on 0.25 "
    "to 1 trillion tokens; models of a few million parameters on a few million tokens may well "
    "rank otherwise, and agreement here is no proof of the paper's results.",
    "The paper gives one run per row and no spread. Two of its models that differ in nothing but "
    "14 or 16 heads are 1.6 points apart (Tables 11 and 13, 8 blocks), so that most of its "
    "differences below one point may be noise.",
    "The 125M baseline of Table 10 equals OPT-125M of Table 3 in all eight tasks: its step to "
    "SwiGLU may compare models trained on different data.",
    "With few seeds an interval is wide: with three it is 4.3 standard errors either way. Of many "
    "comparisons, one in twenty leaves out zero by chance.",
    "One learning rate for all shapes may favour some of them; where rates were tuned, by the same "
    "validation text, the table shows each row's.",
)


def report(pattern: str, output: Path) -> list[str]:
    """Writes the page, its pictures and tables into `output`; returns what to say of it.

    Raises:
      ConfigError: if nothing matches.
    """
    runs = read_runs(pattern)
    models = group_seeds(runs)
    tables = grid_tables(models)
    output.mkdir(parents=True, exist_ok=True)
    sections, texts, pictures = _sections(runs, models, tables)
    for text in texts:
        rundir.write_whole(output / f"{text.name}.csv", to_csv(text))
        rundir.write_whole(output / f"{text.name}.md", to_markdown(text))
    for picture in pictures:
        rundir.write_whole(output / f"{picture.name}.png", picture.light)
    title = "MobileLLM's ablations, trained again" if tables else "Models compared"
    made = (
        f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by mobilellm-jax {mobilellm_jax.__version__}: "
        f"{shlex.join(['mobilellm', 'report', f'--runs={pattern}', f'--output={output}'])} with "
        f"Python {sys.version.split()[0]}."
    )
    rundir.write_whole(output / PAGE, page(title, _lead(runs, models, tables), sections, made))
    unfinished = len(runs) - sum(len(model.runs) for model in models)
    said = [f"{len(models)} models of {len(runs) - unfinished} finished runs, {len(tables)} grids"]
    if unfinished:
        said.append(
            f"{unfinished} runs have no loss at their end and are in no table; the page lists them"
        )
    return [*said, str(output / PAGE)]


def _sections(
    runs: Sequence[Measured], models: Sequence[Model], tables: Sequence[Table]
) -> tuple[list[Section], list[TextTable], list[Picture]]:
    sections = [
        Section(anchor="reading", title="How to read it", bullets=_READING),
        Section(anchor="caveats", title="What it does not show", bullets=_CAVEATS),
    ]
    texts, pictures = list[TextTable](), list[Picture]()
    if not tables:
        sections.clear()
    for number, table in enumerate(tables, start=1):
        name = f"{number}-{table.grid}"
        text = grid_table(table, name)
        texts.append(text)
        drawn = [
            figures.curves(
                f"{name}-curves",
                "Loss during training",
                [(row.row.label, row.model) for row in table.rows],
            )
        ]
        if table.grid == "depth_width":
            drawn.append(figures.depth(f"{name}-depth", table))
        pictures += drawn
        paragraphs = [ABOUT[table.grid].question, _verdict_line([table])]
        if table.missing:
            paragraphs.append(f"Not run or not finished: {'; '.join(table.missing)}.")
        sections.append(
            Section(
                anchor=name,
                title=text.title,
                paragraphs=tuple(filter(None, paragraphs)),
                table=text,
                pictures=tuple(drawn),
            )
        )
    if models:
        everything, drawn = model_table(models), _of_all(models, with_curves=not tables)
        texts.append(everything)
        pictures += drawn
        sections.append(
            Section(
                anchor="models",
                title=everything.title,
                paragraphs=(
                    "Names are blocks x width, heads and key-value heads (h, kv), the "
                    "feed-forward's width (f), and what else is special.",
                ),
                table=everything,
                pictures=tuple(drawn),
            )
        )
    unfinished = tuple(map(_unfinished_line, (run for run in runs if not run.is_finished)))
    if unfinished:
        sections.append(Section(anchor="unfinished", title="Not finished", bullets=unfinished))
    return sections, texts, pictures


def _of_all(models: Sequence[Model], with_curves: bool) -> list[Picture]:
    drawn = []
    if with_curves:
        labelled = [(model.name, model) for model in models]
        drawn.append(figures.curves("curves", "Loss during training", labelled))
    if any(model.tokens_per_sec for model in models):
        drawn.append(figures.speed("speed", models))
    if any(model.peak_bytes for model in models):
        drawn.append(figures.memory("memory", models))
    return drawn


def _lead(runs: Sequence[Measured], models: Sequence[Model], tables: Sequence[Table]) -> list[str]:
    if not models:
        return ["No run has finished yet."]
    sizes = [model.parameters for model in models]
    tokens = {
        m.config.train.steps * m.config.train.global_batch * m.config.data.seq_len for m in models
    }
    seeds = sorted({len(model.runs) for model in models})
    lead = []
    if tables:
        lead.append(
            "The paper MobileLLM (Liu et al. 2024, arXiv:2402.14905) argues by comparing small "
            "language models that differ in one thing: depth against width, kinds of attention "
            "heads, shared embeddings, shared layers. This page repeats those comparisons"
            + _scale_words(tables)
            + " and puts the paper's numbers beside them."
        )
    lead.append(
        f"{len(models)} models of {_span(sizes, 1e6, 'million')} parameters, "
        f"{_span(sorted(tokens), 1e6, 'million')} tokens each, {' or '.join(map(str, seeds))} "
        f"{'seed' if seeds == [1] else 'seeds'}, on {', '.join(_data(models))}."
    )
    lead.append(_verdict_line(tables))
    return [text for text in lead if text]


def _scale_words(tables: Sequence[Table]) -> str:
    scales: set[ScaleName] = {table.scale for table in tables}
    return "" if scales == {"paper"} else " with much smaller models"


def _data(models: Sequence[Model]) -> list[str]:
    return sorted({Path(model.config.data.path).name for model in models})


def _span(values: Sequence[int], unit: float, word: str) -> str:
    low, high = (f"{value / unit:,.2f}" for value in (min(values), max(values)))
    return f"{low} {word}" if low == high else f"{low} to {high} {word}"


def _verdict_line(tables: Sequence[Table]) -> str:
    counts = count_verdicts(tables)
    total = sum(counts.values())
    if not total:
        return ""
    parts = [f"{number} {verdict}" for verdict, number in counts.most_common()]
    return f"Differences beside the paper's: {total}, of which {', '.join(parts)}."


def _unfinished_line(run: Measured) -> str:
    state = "under way or stopped"
    if run.failed:
        state = f"failed: {run.failed.splitlines()[0]}"
    elif run.has_diverged:
        state = "diverged: its validation loss is not finite"
    return f"{run.folder.name}, step {run.last_step} of {run.config.train.steps}, {state}"
