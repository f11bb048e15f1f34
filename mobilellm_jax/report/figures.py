"""The report's pictures, each drawn twice: for a light and for a dark page."""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mobilellm_jax.report.colors import DARK, LIGHT, Theme
from mobilellm_jax.report.compare import Model, Table

_MARKERS = "osD^vP*Xhp"
_WIDTH_IN, _DPI = 4.8, 200  # narrow, so that a phone shows it without making its text small

Draw = Callable[[Axes, Theme], None]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing for both kinds of page."""

    name: str  # of its file
    title: str
    caption: str
    light: bytes  # PNG
    dark: bytes


def curves(name: str, title: str, labelled: Sequence[tuple[str, Model]]) -> Picture:
    """Draws validation loss against tokens: the mean over seeds in a band from least to most."""

    def draw(axes: Axes, theme: Theme) -> None:
        for number, (label, model) in enumerate(labelled):
            color = theme.series[number % len(theme.series)]
            config = model.config
            tokens = config.train.global_batch * config.data.seq_len / 1e6
            series = [run.validation for run in model.runs]
            # The first is that of an untrained model, the same for all.
            steps = [s for s in sorted(series[0]) if s and all(s in run for run in series)]
            values = [[run[s] for run in series] for s in steps]
            x = [s * tokens for s in steps]
            means = [math.fsum(v) / len(v) for v in values]
            style = "-" if number < len(theme.series) else "--"
            axes.plot(x, means, style, color=color, linewidth=1.4, label=label)
            if len(series) > 1:
                least, most = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(x, least, most, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)")
        _legend(axes, theme)

    seeds = max(len(model.runs) for _, model in labelled)
    band = f"Bands span the {seeds} seeds." if seeds > 1 else "One seed: no band."
    return _picture(name, title, f"Mean validation loss during training. {band}", draw)


def depth(name: str, table: Table) -> Picture:
    """Draws loss against depth at one number of parameters."""

    def draw(axes: Axes, theme: Theme) -> None:
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
        axes.set(xlabel="blocks", ylabel="validation loss (nats per token)", xscale="log")
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
        paper.set_ylabel("paper's mean score (%)", color=theme.text)
        _style(paper, theme)
        paper.grid(False)
        handles = [*axes.get_legend_handles_labels()[0], *paper.get_legend_handles_labels()[0]]
        _legend(axes, theme, handles)

    caption = (
        "Ours with standard errors over seeds; the paper's score of the row that each of ours "
        "stands for, which has other depths at the small scales."
    )
    return _picture(name, "Loss against depth at fixed parameters", caption, draw)


def speed(name: str, models: Sequence[Model]) -> Picture:
    """Draws loss against training tokens per second."""

    def draw(axes: Axes, theme: Theme) -> None:
        _points(axes, theme, models, lambda m: m.tokens_per_sec or 0.0, lambda m: m.loss.value)
        axes.set(xlabel="tokens/s while training", ylabel="validation loss (nats per token)")

    caption = (
        "Lower right is better. Rates are medians on the machine that trained, which other work "
        "may have slowed; numbers are those of the table of all models."
    )
    return _picture(name, "Loss against speed", caption, draw)


def memory(name: str, models: Sequence[Model]) -> Picture:
    """Draws peak memory against parameters."""

    def draw(axes: Axes, theme: Theme) -> None:
        _points(
            axes, theme, models, lambda m: m.parameters / 1e6, lambda m: (m.peak_bytes or 0) / 1e6
        )
        axes.set(xlabel="million parameters", ylabel="peak memory while training (MB)")

    kinds = {run.peak_of for model in models for run in model.runs if run.peak_of}
    caption = (
        f"Peak memory of the {' or the '.join(sorted(kinds))} while it trained, everything "
        "included; numbers are those of the table of all models."
    )
    return _picture(name, "Parameters against memory", caption, draw)


def _points(
    axes: Axes,
    theme: Theme,
    models: Sequence[Model],
    x: Callable[[Model], float],
    y: Callable[[Model], float],
) -> None:
    for number, model in enumerate(models):
        color = theme.series[number % len(theme.series)]
        marker = _MARKERS[number // len(theme.series) % len(_MARKERS)]
        axes.plot(x(model), y(model), marker, color=color, markersize=6)
        axes.annotate(
            str(number + 1),
            (x(model), y(model)),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
            color=theme.text,
        )


def _picture(name: str, title: str, caption: str, draw: Draw) -> Picture:
    return Picture(name, title, caption, _png(draw, LIGHT), _png(draw, DARK))


def _png(draw: Draw, theme: Theme) -> bytes:
    figure = Figure(figsize=(_WIDTH_IN, 0.8 * _WIDTH_IN), layout="constrained")
    figure.set_facecolor(theme.background)
    axes = figure.subplots()
    _style(axes, theme)
    draw(axes, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, labelsize=9)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    for spine in axes.spines.values():
        spine.set_color(theme.line)
    axes.grid(color=theme.line, linewidth=0.5)


def _legend(axes: Axes, theme: Theme, handles: Sequence[Any] | None = None) -> None:
    options: dict[str, Any] = {"handles": handles} if handles else {}
    # Below the axes, where it hides no curve.
    legend = axes.figure.legend(
        loc="outside lower center", ncols=1 if handles else 2, fontsize=8, frameon=False, **options
    )
    for text in legend.get_texts():
        text.set_color(theme.text)
