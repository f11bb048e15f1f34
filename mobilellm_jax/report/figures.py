"""Draws the report's pictures, each for a light and for a dark page."""

import dataclasses
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mobilellm_jax.report.colors import DARK, LIGHT, Theme
from mobilellm_jax.report.compare import Model, Table
from mobilellm_jax.storage.picture import png, shorten, show_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xhp"
_WIDTH_IN, _DPI = 4.8, 200  # A narrow picture keeps its text legible on a phone.
_LINE_IN = 0.17  # Height of a line of the legend.
# Longest line of the legend in characters, if the legend has one column or two columns.
_ONE_COLUMN, _TWO_COLUMNS = 62, 28
_LONGEST_LABEL = 2 * _ONE_COLUMN
_FEW = 8  # A curve with at most this number of points shows each point.
_LEAST_LOSS = 0.05  # Smallest range of a loss axis in nats: seeds differ by about this much.
_LEAST_SPEED = 0.2  # Smallest range of a speed axis, as a share of the highest speed.
_LOSS = "validation loss (nats per token)"

Draw = Callable[["Axes", Theme], None]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in a light and a dark version."""

    name: str  # Name of the PNG file without its ending.
    title: str
    caption: str
    light: bytes  # PNG for a light page.
    dark: bytes  # PNG for a dark page.


def curves(name: str, labelled: Sequence[tuple[str, Model]]) -> Picture:
    """Draws mean validation loss against tokens, and a band from the lowest to the highest loss.

    The curves omit step 0, because all untrained models have about the same loss. A picture of one
    model also has the training loss, which is recorded more often.
    """
    labels = [_label(label) for label, _ in labelled]

    def draw(axes: "Axes", theme: Theme) -> None:
        for number, (label, (_, model)) in enumerate(zip(labels, labelled, strict=True)):
            color = theme.series[number % len(theme.series)]
            tokens = model.config.tokens_per_step / 1e6
            series = [run.validation for run in model.runs]
            steps = [s for s in sorted(series[0]) if s and all(s in run for run in series)]
            values = [[run[s] for run in series] for s in steps]
            x = [s * tokens for s in steps]
            style = "-" if number < len(theme.series) else "--"
            marker = "o" if len(x) <= _FEW else ""
            if marker and len(labelled) == 1:
                style = "none"  # The training loss shows how the loss falls between the points.
            means = [statistics.fmean(v) for v in values]
            axes.plot(x, means, linestyle=style, color=color, marker=marker, label=label)
            if len(series) > 1:
                least, most = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(x, least, most, color=color, alpha=0.2, linewidth=0)
        if len(labelled) == 1:
            _draw_training(axes, theme, labelled[0][1])
        axes.set(xlabel="million tokens", ylabel=_LOSS if len(labelled) > 1 else _LOSS[11:])
        show_at_least(axes, "y", _LEAST_LOSS)
        _legend(axes, ncols=_columns(labels))

    seeds = max(len(model.runs) for _, model in labelled)
    band = f"Bands span the {seeds} seeds." if seeds > 1 else "One seed: no band."
    caption = f"Mean validation loss during training. {band}"
    return _picture(name, "Loss during training", caption, draw, labels)


def _draw_training(axes: "Axes", theme: Theme, model: Model) -> None:
    """Draws the training loss of a model in a muted colour, one line for each run."""
    tokens = model.config.tokens_per_step / 1e6
    for number, run in enumerate(model.runs):
        x = [step * tokens for step in sorted(run.training)]
        y = [run.training[step] for step in sorted(run.training)]
        label = "" if number else "training loss"
        axes.plot(x, y, color=theme.muted, linewidth=0.8, zorder=1, label=label)


def depth(name: str, table: Table) -> Picture:
    """Draws loss against depth for models with equally many parameters.

    The axis of the loss is upside down, so that up is better on both axes.
    """
    labels = ["ours: loss (left axis, upside down)", "paper: mean score (right axis)"]

    def draw(axes: "Axes", theme: Theme) -> None:
        blocks = [row.model.config.model.num_blocks for row in table.rows]
        losses = [row.model.loss for row in table.rows]
        axes.errorbar(
            blocks,
            [loss.value for loss in losses],
            [loss.standard_error or 0.0 for loss in losses],
            fmt="o-",
            color=theme.series[0],
            capsize=3,
            linewidth=1.4,
            label=labels[0],
        )
        axes.set(xlabel="blocks", ylabel="loss (nats), up is better", xscale="log")
        axes.set_xticks(blocks, [str(b) for b in blocks])
        axes.minorticks_off()
        show_at_least(axes, "y", _LEAST_LOSS)
        axes.invert_yaxis()
        paper = axes.twinx()
        paper.plot(
            blocks,
            [row.paper_score for row in table.rows],
            "s--",
            color=theme.series[1],
            linewidth=1.2,
            label=labels[1],
        )
        paper.set_ylabel("paper's score (%), up is better")
        paper.grid(False)
        handles = [*axes.get_legend_handles_labels()[0], *paper.get_legend_handles_labels()[0]]
        _legend(axes, handles=handles)

    caption = (
        "Up is better on both axes. Our losses have standard errors over seeds. The paper's score "
        "belongs to the row that each of our rows stands for; at the small scales that row has "
        "another depth."
    )
    return _picture(name, "Loss against depth at fixed parameters", caption, draw, labels)


def speed(models: Sequence[Model]) -> Picture:
    """Draws loss against training tokens per second."""
    caption = (
        "Lower right is better. Rates are medians on the machine that trained; other work on it "
        "may have slowed it. The numbers are the numbers in the table of all models."
    )
    known = [model for model in models if model.tokens_per_sec]
    rates = [model.tokens_per_sec or 0.0 for model in known]
    points = [(model.tokens_per_sec, model.loss.value) for model in models]
    least = _LEAST_SPEED * max(rates, default=1.0), _LEAST_LOSS
    draw = _points(points, "tokens/s while training", _LOSS, least)
    return _picture("speed", "Loss against speed", caption, draw)


def memory(models: Sequence[Model]) -> Picture:
    """Draws peak memory against parameters."""
    kinds = {run.peak_of for model in models for run in model.runs if run.peak_of}
    caption = (
        f"Peak memory of the {' or the '.join(sorted(kinds))} during training, everything "
        "included. The numbers are the numbers in the table of all models."
    )
    points = [
        (model.parameters / 1e6, model.peak_bytes / 1e6 if model.peak_bytes else None)
        for model in models
    ]
    least = 0.0, max((y for _, y in points if y is not None), default=1.0) * _LEAST_SPEED
    draw = _points(points, "million parameters", "peak memory while training (MB)", least)
    return _picture("memory", "Parameters against memory", caption, draw)


def _points(
    points: Sequence[tuple[float | None, float | None]],
    xlabel: str,
    ylabel: str,
    least: tuple[float, float],
) -> Draw:
    """Returns a function that draws numbered points, each with its own colour and marker.

    A point with an unknown coordinate is left out. `least` has the smallest ranges of the axes.
    """

    def draw(axes: "Axes", theme: Theme) -> None:
        for number, (x, y) in enumerate(points):
            if x is None or y is None:
                continue
            row, column = divmod(number, len(theme.series))
            marker = _MARKERS[row % len(_MARKERS)]
            axes.plot(x, y, marker, color=theme.series[column], markersize=6)
            place: dict[str, Any] = {"xytext": (5, 3), "textcoords": "offset points"}
            axes.annotate(str(number + 1), (x, y), fontsize=8, **place)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.ticklabel_format(useOffset=False)
        show_at_least(axes, "x", least[0])
        show_at_least(axes, "y", least[1])

    return draw


def _picture(
    name: str, title: str, caption: str, draw: Draw, labels: Sequence[str] = ()
) -> Picture:
    """Draws both versions; the height depends on the number of lines in the legend (`labels`)."""
    lines = sum(label.count("\n") + 1 for label in labels) / _columns(labels)
    size = (_WIDTH_IN, 0.72 * _WIDTH_IN + _LINE_IN * lines)

    def version(theme: Theme) -> bytes:
        def fill(figure: "Figure") -> None:
            draw(figure.subplots(), theme)

        return png(fill, size, _DPI, _look(theme))

    return Picture(name, title, caption, version(LIGHT), version(DARK))


def _look(theme: Theme) -> dict[str, Any]:
    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(texts, theme.text),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.background),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme.line),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
        **{"axes.grid": True, "grid.linewidth": 0.5},
        **{"lines.linewidth": 1.4, "lines.markersize": 4},
    }


def _label(text: str) -> str:
    """Returns the text of a legend in lines; a very long text loses its middle."""
    return textwrap.fill(shorten(text, _LONGEST_LABEL), _ONE_COLUMN)


def _columns(labels: Sequence[str]) -> int:
    return 2 if all(len(label) <= _TWO_COLUMNS for label in labels) else 1


def _legend(axes: "Axes", **options: Any) -> None:
    """Puts the legend below the axes, where it hides no curve."""
    axes.figure.legend(loc="outside lower center", fontsize=8, frameon=False, **options)
