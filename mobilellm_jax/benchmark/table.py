"""Turns measurements into a table and a picture.

Energy is an estimate from the paper (Sec. 1): a token needs 0.1 J per billion parameters. The
parameters of a block count once for each application of the block. Battery hours assume the paper's
phone: its battery holds about 50 kJ, and it decodes 10 tokens/s. The estimate ignores the rest of
the phone, so the table shows more than one week as "> 168" hours.
"""

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm_jax.benchmark.measure import Measurement
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.size import block_matrix_parameters, parameter_count
from mobilellm_jax.storage.picture import png, shorten, show_at_least
from mobilellm_jax.storage.rundir import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_JOULES_PER_TOKEN_AND_BILLION = 0.1
_BATTERY_JOULES = 50e3
_TOKENS_PER_SEC = 10.0
_MAX_BATTERY_HOURS = 168.0
_LEAST_LOSS = 0.05  # Smallest range of the loss axis, in nats. Smaller differences are noise.
RESULTS = ("benchmark.json", "benchmark.csv", "benchmark.md", "benchmark.png")


def _column(title: str, form: str) -> Any:
    return dataclasses.field(metadata={"title": title, "form": form})


@dataclasses.dataclass(frozen=True)
class Row:
    """The medians of one model, and estimates of its energy and battery life."""

    name: str = _column("model", "{}")
    runtime: str = _column("runtime", "{}")
    precision: str = _column("weights", "{}")
    megabytes: float = _column("MB", "{:,.2f}")
    bits_per_parameter: float = _column("bits/parameter", "{:.1f}")  # Shared blocks count once.
    load_sec: float = _column("load s", "{:.3f}")
    init_sec: float = _column("init s", "{:.3f}")
    prefill_tokens_per_sec: float = _column("prefill tok/s", "{:,.0f}")
    decode_tokens_per_sec: float = _column("decode tok/s", "{:,.1f}")
    memory_megabytes: float = _column("memory MB", "{:,.0f}")
    loss: float = _column("loss", "{:.4f}")
    joules_per_token: float = _column("J/token (est.)", "{:.2g}")
    battery_hours: float = _column("battery h (est.)", "{:,.0f}")


def summarize(measurements: Sequence[Measurement], prompt_tokens: int) -> Row:
    """Returns the medians over all processes and rounds of one model."""
    first = measurements[0]
    joules = joules_per_token(first.model)
    prefill = statistics.median(sec for m in measurements for sec in m.prefill_sec)
    decode = statistics.median(sec for m in measurements for sec in m.decode_sec)
    return Row(
        name=Path(first.path).name or first.path,
        runtime=first.runtime,
        precision=first.precision,
        megabytes=first.model_bytes / 1e6,
        bits_per_parameter=8 * first.model_bytes / parameter_count(first.model),
        load_sec=statistics.median(m.load_sec for m in measurements),
        init_sec=statistics.median(m.init_sec for m in measurements),
        prefill_tokens_per_sec=prompt_tokens / prefill,
        decode_tokens_per_sec=1 / decode,
        memory_megabytes=statistics.median(m.memory_bytes for m in measurements) / 1e6,
        loss=first.loss,
        joules_per_token=joules,
        battery_hours=_BATTERY_JOULES / (joules * _TOKENS_PER_SEC) / 3600,
    )


def is_benchmark(folder: Path) -> bool:
    """Returns whether `write_results` wrote the results in a folder."""
    table = folder / "benchmark.md"
    first = next(field.metadata["title"] for field in dataclasses.fields(Row))
    return table.is_file() and table.read_text("utf-8", errors="replace").startswith(f"| {first} ")


def write_results(
    folder: Path, rows: Sequence[Row], measured: Sequence[Sequence[Measurement]], text: str
) -> None:
    """Writes the files of `RESULTS`; `text` names the text that was read."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(each) for model in measured for each in model]
    write_whole(folder / "benchmark.json", json.dumps(values, indent=1) + "\n")
    write_whole(folder / "benchmark.csv", as_csv(rows))
    write_whole(folder / "benchmark.md", markdown(rows, text))
    write_whole(folder / "benchmark.png", plot(rows, text))


def joules_per_token(config: ModelConfig) -> float:
    """Returns the estimated energy for one token."""
    used = config.applied_depth * block_matrix_parameters(config)
    used += config.vocab_size * config.embed_dim
    return _JOULES_PER_TOKEN_AND_BILLION * used / 1e9


def markdown(rows: Sequence[Row], text: str) -> str:
    """Returns the table as Markdown, with a last line that names the text that models read."""
    columns = dataclasses.fields(Row)
    titles = [column.metadata["title"] for column in columns]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row, column) for column in columns) + " |")
    lines += ["", f"The loss (nats per token) and the prompt are from {text}."]
    return "\n".join(lines) + "\n"


def _cell(row: Row, column: "dataclasses.Field[Any]") -> str:
    if column.name == "battery_hours" and row.battery_hours > _MAX_BATTERY_HOURS:
        return f"> {_MAX_BATTERY_HOURS:.0f}"
    text: str = column.metadata["form"].format(getattr(row, column.name))
    return text


def as_csv(rows: Sequence[Row]) -> str:
    """Returns the rows as CSV with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Row], text: str) -> bytes:
    """Returns a PNG image that plots loss and decoding speed over the size of the model file."""
    return png(lambda figure: _draw(figure, rows, text), (11, 4.8), 120)


def _draw(figure: "Figure", rows: Sequence[Row], text: str) -> None:
    from matplotlib.lines import Line2D

    left, right = figure.subplots(1, 2)
    _scatter(left, rows, [row.loss for row in rows], "loss (nats per token)")
    left.set_title(f"on {shorten(text, 50)}", fontsize=9)
    left.ticklabel_format(axis="y", useOffset=False)
    show_at_least(left, "y", _LEAST_LOSS)
    _scatter(right, rows, [row.decode_tokens_per_sec for row in rows], "decoding (tokens/s)")
    right.set(yscale="log")
    right.yaxis.set_major_formatter("{x:,.4g}")
    right.yaxis.set_minor_formatter("{x:,.4g}")
    names = [f"{number}  {row.name}, {row.precision}" for number, row in enumerate(rows, start=1)]
    figure.legend(
        [Line2D([], [], linestyle="") for _ in rows],
        [shorten(name, 40) for name in names],
        loc="outside right upper",
        handlelength=0,
        fontsize=8,
    )


def _scatter(axes: "Axes", rows: Sequence[Row], heights: Sequence[float], label: str) -> None:
    """Labels points with numbers, because names of models of similar size would overlap."""
    axes.scatter([row.megabytes for row in rows], heights, s=40, zorder=3)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True), start=1):
        step = (6, 4) if number % 2 else (-12, -10)
        axes.annotate(
            str(number),
            (row.megabytes, height),
            xytext=step,
            textcoords="offset points",
            fontsize=9,
        )
    axes.set(xlabel="model file (MB)", ylabel=label, xscale="log")
    axes.xaxis.set_major_formatter("{x:,.4g}")
    axes.xaxis.set_minor_formatter("{x:,.4g}")
    axes.tick_params(which="both", labelsize=7)
    axes.margins(0.15)
    low, high = axes.get_xlim()
    if high < 2 * low:  # On a narrower axis, small differences of the size look large.
        middle = (low * high) ** 0.5
        axes.set_xlim(middle / 2**0.5, middle * 2**0.5)
    axes.grid(alpha=0.3, which="both")
