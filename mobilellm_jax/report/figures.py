"""Draws the report's pictures, each for a light and for a dark page."""

import dataclasses
import io
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mobilellm_jax.report.colors import DARK, LIGHT, Theme
from mobilellm_jax.report.compare import Model, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*Xhp"
_WIDTH_IN, _DPI = 4.8, 200  # A narrow picture keeps its text legible on a phone.
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
    """Draws mean validation loss against tokens, and a band from the lowest to the highest loss."""

    def draw(axes: "Axes", theme: Theme) -> None:
        for number, (label, model) in enumerate(labelled):
            color = theme.series[number % len(theme.series)]
            tokens = model.config.tokens_per_step / 1e6
            series = [run.validation for run in model.runs]
            # The curves omit step 0, because all untrained models have about the same loss.
            steps = [s for s in sorted(series[0]) if s and all(s in run for run in series)]
            values = [[run[s] for run in series] for s in steps]
            x = [s * tokens for s in steps]
            style = "-" if number < len(theme.series) else "--"
            means = [statistics.fmean(v) for v in values]
            axes.plot(x, means, style, color=color, linewidth=1.4, label=label)
            if len(series) > 1:
                least, most = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(x, least, most, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="million tokens", ylabel=_LOSS)
        _legend(axes, ncols=2)

    seeds = max(len(model.runs) for _, model in labelled)
    band = f"Bands span the {seeds} seeds." if seeds > 1 else "One seed: no band."
    caption = f"Mean validation loss during training. {band}"
    return _picture(name, "Loss during training", caption, draw)


def depth(name: str, table: Table) -> Picture:
    """Draws loss against depth for models with equally many parameters."""

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
            label="ours: loss (left, less is better)",
        )
        axes.set(xlabel="blocks", ylabel=_LOSS, xscale="log")
        axes.set_xticks(blocks, [str(b) for b in blocks])
        axes.minorticks_off()
        paper = axes.twinx()
        paper.plot(
            blocks,
            [row.paper_score for row in table.rows],
            "s--",
            color=theme.series[1],
            linewidth=1.2,
            label="paper: mean score (right, more is better)",
        )
        paper.set_ylabel("paper's mean score (%)")
        paper.grid(False)
        handles = [*axes.get_legend_handles_labels()[0], *paper.get_legend_handles_labels()[0]]
        _legend(axes, handles=handles)

    caption = (
        "Our losses have standard errors over seeds. The paper's score belongs to the row that "
        "each of our rows stands for; at the small scales that row has another depth."
    )
    return _picture(name, "Loss against depth at fixed parameters", caption, draw)


def speed(models: Sequence[Model]) -> Picture:
    """Draws loss against training tokens per second."""
    caption = (
        "Lower right is better. Rates are medians on the machine that trained; other work on it "
        "may have slowed it. The numbers are the numbers in the table of all models."
    )
    points = [(model.tokens_per_sec or 0.0, model.loss.value) for model in models]
    draw = _points(points, "tokens/s while training", _LOSS)
    return _picture("speed", "Loss against speed", caption, draw)


def memory(models: Sequence[Model]) -> Picture:
    """Draws peak memory against parameters."""
    kinds = {run.peak_of for model in models for run in model.runs if run.peak_of}
    caption = (
        f"Peak memory of the {' or the '.join(sorted(kinds))} during training, everything "
        "included. The numbers are the numbers in the table of all models."
    )
    points = [(model.parameters / 1e6, (model.peak_bytes or 0) / 1e6) for model in models]
    draw = _points(points, "million parameters", "peak memory while training (MB)")
    return _picture("memory", "Parameters against memory", caption, draw)


def _points(points: Sequence[tuple[float, float]], xlabel: str, ylabel: str) -> Draw:
    """Returns a function that draws numbered points, each with its own colour and marker."""

    def draw(axes: "Axes", theme: Theme) -> None:
        for number, point in enumerate(points):
            row, column = divmod(number, len(theme.series))
            marker = _MARKERS[row % len(_MARKERS)]
            axes.plot(*point, marker, color=theme.series[column], markersize=6)
            place: dict[str, Any] = {"xytext": (5, 3), "textcoords": "offset points"}
            axes.annotate(str(number + 1), point, fontsize=8, **place)
        axes.set(xlabel=xlabel, ylabel=ylabel)

    return draw


def _picture(name: str, title: str, caption: str, draw: Draw) -> Picture:
    return Picture(name, title, caption, _png(draw, LIGHT), _png(draw, DARK))


def _png(draw: Draw, theme: Theme) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = {  # The types of matplotlib list every valid key.
        **dict.fromkeys(texts, theme.text),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.background),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme.line),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
        **{"axes.grid": True, "grid.linewidth": 0.5},
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(_WIDTH_IN, 0.8 * _WIDTH_IN), layout="constrained")
        draw(figure.subplots(), theme)
        figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _legend(axes: "Axes", **options: Any) -> None:
    """Puts the legend below the axes, where it hides no curve."""
    axes.figure.legend(loc="outside lower center", fontsize=8, frameon=False, **options)
