"""Formats the report's tables as rows of text, as CSV and as Markdown."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from mobilellm_jax.paper.grids import ABOUT
from mobilellm_jax.report.compare import Compared, Mean, Model, Table

NONE = "–"  # noqa: RUF001  # An en dash marks a cell without a value.


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column names the row."""

    name: str  # Name of the CSV and Markdown files without their ending.
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_GRID_COLUMNS = (
    *("row", "loss", "± SE", "difference", "± SE of it", "paper's difference", "direction"),
    *("paper's score", "seeds", "learning rate", "parameters", "paper's parameters"),
)
_MODEL_COLUMNS = (
    *("model", "number", "parameters", "applied depth", "tokens", "learning rate", "seeds"),
    *("loss", "± SE", "bits per byte", "tokens/s", "peak memory, MB"),
)


def grid_table(table: Table, name: str) -> TextTable:
    """Returns the table of a grid with the paper's values beside ours."""
    about = ABOUT[table.grid]
    group = f", {table.group}" if table.scale == "paper" else ""
    title = f"{about.title} (Table {about.table}, {table.scale}{group})"
    title += f": {table.setting}" if table.setting else ""
    return TextTable(name, title, _GRID_COLUMNS, tuple(map(_grid_row, table.rows)))


def model_table(models: Sequence[Model]) -> TextTable:
    """Returns the table of all models that have finished runs."""
    rows = tuple(_model_row(number, model) for number, model in enumerate(models, start=1))
    return TextTable("models", "All models", _MODEL_COLUMNS, rows)


def to_csv(table: TextTable) -> str:
    """Returns the table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(tuple("" if cell == NONE else cell for cell in row) for row in table.rows)
    return buffer.getvalue()


def to_markdown(table: TextTable) -> str:
    """Returns the table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(table.columns)
    return "\n".join([line(table.columns), rule, *map(line, table.rows)]) + "\n"


def _grid_row(compared: Compared) -> tuple[str, ...]:
    model, difference = compared.model, compared.difference
    return (
        compared.row.label,
        f"{model.loss.value:.4f}",
        _error(model.loss),
        _cell(difference.value if difference else None, "+.4f"),
        _error(difference),
        _cell(compared.paper_difference, "+.1f"),
        compared.verdict or NONE,
        f"{compared.paper_score:.1f}",
        str(model.loss.count),
        f"{model.config.optimizer.peak_lr:g}",
        f"{model.parameters:,}",
        f"{compared.row.paper.params_millions:g}M",
    )


def _model_row(number: int, model: Model) -> tuple[str, ...]:
    return (
        model.name,
        str(number),
        f"{model.parameters:,}",
        str(model.config.model.applied_depth),
        f"{model.tokens:,}",
        f"{model.config.optimizer.peak_lr:g}",
        str(model.loss.count),
        f"{model.loss.value:.4f}",
        _error(model.loss),
        _cell(model.bpb, ".4f"),
        _cell(model.tokens_per_sec, ",.0f"),
        _cell(model.peak_bytes / 1e6 if model.peak_bytes else None, ",.0f"),
    )


def _error(value: Mean | None) -> str:
    return _cell(value.standard_error if value else None, ".4f")


def _cell(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
