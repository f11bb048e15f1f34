"""The report's tables as rows of text, and as CSV and Markdown."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from mobilellm_jax.paper.grids import ABOUT
from mobilellm_jax.report.compare import Compared, Mean, Model, Table

NONE = "–"  # noqa: RUF001  # a dash that stands for no value


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column names the row."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


GRID_COLUMNS = (
    *("row", "loss", "± SE", "difference", "± SE of it", "paper's difference", "direction"),
    *("paper's score", "seeds", "learning rate", "parameters", "paper's parameters"),
)
MODEL_COLUMNS = (
    *("model", "number", "parameters", "applied depth", "tokens", "learning rate", "seeds"),
    *("loss", "± SE", "bits per byte", "tokens/s", "peak memory, MB"),
)


def title_of(table: Table) -> str:
    """Returns what a grid's table is called."""
    about = ABOUT[table.grid]
    text = f"{about.title} (Table {about.table}, {table.scale}"
    text += f", {table.group})" if table.scale == "paper" else ")"
    return text + (f": {table.setting}" if table.setting else "")


def grid_table(table: Table, name: str) -> TextTable:
    """Returns a grid's table with the paper's values beside ours."""
    return TextTable(name, title_of(table), GRID_COLUMNS, tuple(_grid_row(r) for r in table.rows))


def model_table(models: Sequence[Model]) -> TextTable:
    """Returns the table of everything that has finished."""
    rows = []
    for number, model in enumerate(models, start=1):
        config, loss = model.config, model.loss
        tokens = config.train.steps * config.train.global_batch * config.data.seq_len
        rate = model.tokens_per_sec
        rows.append(
            (
                model.name,
                str(number),
                f"{model.parameters:,}",
                str(config.model.applied_depth),
                f"{tokens:,}",
                f"{config.optimizer.peak_lr:g}",
                str(loss.count),
                f"{loss.value:.4f}",
                _error(loss),
                NONE if model.bpb is None else f"{model.bpb:.4f}",
                NONE if rate is None else f"{rate:,.0f}",
                NONE if model.peak_bytes is None else f"{model.peak_bytes / 1e6:,.0f}",
            )
        )
    return TextTable("models", "All models", MODEL_COLUMNS, tuple(rows))


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

    rule = "|".join(["", *("---" for _ in table.columns), ""])
    return "\n".join([line(table.columns), rule, *map(line, table.rows)]) + "\n"


def _grid_row(compared: Compared) -> tuple[str, ...]:
    model, row, difference = compared.model, compared.row, compared.difference
    paper = compared.paper_difference
    return (
        row.label,
        f"{model.loss.value:.4f}",
        _error(model.loss),
        NONE if difference is None else f"{difference.value:+.4f}",
        NONE if difference is None else _error(difference),
        NONE if paper is None else f"{paper:+.1f}",
        compared.verdict or NONE,
        f"{compared.paper_score:.1f}",
        str(model.loss.count),
        f"{model.config.optimizer.peak_lr:g}",
        f"{model.parameters:,}",
        f"{row.paper.params_millions:g}M",
    )


def _error(value: Mean) -> str:
    return NONE if value.standard_error is None else f"{value.standard_error:.4f}"
