"""Makes the sections of the page, and formats their tables as CSV and as Markdown."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence

from mobilellm_jax.paper.grids import ABOUT
from mobilellm_jax.report import figures
from mobilellm_jax.report.compare import Compared, Mean, Model, Table, count_verdicts
from mobilellm_jax.report.figures import Picture

NONE = "–"  # noqa: RUF001  # An en dash marks a cell without a value.
_NAMES = (
    "A name gives blocks x width, heads and key-value heads (h, kv), the width of the "
    "feed-forward layer (f), and further settings."
)

Rows = Sequence[dict[str, str]]
"""The rows of a table as cells by the name of their column; the first column names the row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A table under a heading, with texts above it and pictures below it."""

    name: str  # Anchor on the page, and name of the CSV and Markdown files without their ending.
    title: str
    texts: Sequence[str]
    rows: Rows
    pictures: Sequence[Picture]


def grid_section(number: int, table: Table) -> Section:
    """Returns the section of a grid, whose table has the paper's values next to ours."""
    about, name = ABOUT[table.grid], f"{number}-{table.grid}"
    group = f", {table.group}" if table.scale == "paper" else ""
    setting = f": {table.setting}" if table.setting else ""
    texts = [about.question, verdict_line([table])]
    if table.missing:
        texts.append(f"Not run or not finished: {'; '.join(table.missing)}.")
    labelled = [(row.row.label, row.model) for row in table.rows]
    pictures = [figures.curves(f"{name}-curves", labelled)]
    if table.grid == "depth_width":
        pictures.append(figures.depth(f"{name}-depth", table))
    return Section(
        name=name,
        title=f"{about.title} (Table {about.table}, {table.scale}{group}){setting}",
        texts=[text for text in texts if text],
        rows=[_grid_row(compared) for compared in table.rows],
        pictures=pictures,
    )


def model_section(models: Sequence[Model], with_curves: bool) -> Section:
    """Returns the section of all models that have finished runs."""
    pictures = []
    if with_curves:
        pictures.append(figures.curves("curves", [(model.name, model) for model in models]))
    if sum(bool(model.tokens_per_sec) for model in models) > 1:
        pictures.append(figures.speed(models))
    if sum(bool(model.peak_bytes) for model in models) > 1:
        pictures.append(figures.memory(models))
    return Section(
        name="models",
        title="All models" if len(models) > 1 else "The model",
        texts=[_NAMES],
        rows=[_model_row(number, model) for number, model in enumerate(models, start=1)],
        pictures=pictures,
    )


def verdict_line(tables: Sequence[Table]) -> str:
    """Returns a sentence with the number of each verdict, or "" if there is no verdict."""
    counts = count_verdicts(tables)
    parts = [f"{number} {verdict}" for verdict, number in counts.most_common()]
    if not parts:
        return ""
    return f"Differences compared with the paper's: {counts.total()}, of which {', '.join(parts)}."


def to_csv(rows: Rows) -> str:
    """Returns the table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if cell == NONE else cell for name, cell in row.items()})
    return buffer.getvalue()


def to_markdown(rows: Rows) -> str:
    """Returns the table as Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(rows[0])
    return "\n".join([line(rows[0]), rule, *(line(row.values()) for row in rows)]) + "\n"


def _grid_row(compared: Compared) -> dict[str, str]:
    model, difference = compared.model, compared.difference
    return {
        "row": compared.row.label,
        "loss": f"{model.loss.value:.4f}",
        "± SE": _error(model.loss),
        "difference": _cell(difference.value if difference else None, "+.4f"),
        "± SE of it": _error(difference),
        "paper's difference": _cell(compared.paper_difference, "+.1f"),
        "direction": compared.verdict or NONE,
        "paper's score": f"{compared.paper_score:.1f}",
        "seeds": str(model.loss.count),
        "learning rate": f"{model.config.optimizer.peak_lr:g}",
        "parameters": f"{model.parameters:,}",
        "paper's parameters": f"{compared.row.paper.params_millions:g}M",
    }


def _model_row(number: int, model: Model) -> dict[str, str]:
    return {
        "model": model.name,
        "number": str(number),
        "parameters": f"{model.parameters:,}",
        "applied depth": str(model.config.model.applied_depth),
        "tokens": f"{model.config.tokens:,}",
        "learning rate": f"{model.config.optimizer.peak_lr:g}",
        "seeds": str(model.loss.count),
        "loss": f"{model.loss.value:.4f}",
        "± SE": _error(model.loss),
        "bits per byte": _cell(model.bpb, ".4f"),
        "tokens/s": _cell(model.tokens_per_sec, ",.0f"),
        "peak memory, MB": _cell(model.peak_bytes / 1e6 if model.peak_bytes else None, ",.0f"),
        "run folders": ", ".join(run.folder.resolve().name for run in model.runs),
    }


def _error(value: Mean | None) -> str:
    return _cell(value.standard_error if value else None, ".4f")


def _cell(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
