"""Draws the losses of a run."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.storage import rundir


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss (nats per token) over the steps as a PNG file.

    Without matplotlib the function draws nothing; `MetricsWriter` warns that the package is absent.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series = (
        ("train/loss", "training", "tab:blue", "-"),
        ("validation/loss", "validation", "tab:orange", "o-"),
    )
    for name, label, color, style in series:
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, color=color, label=label, markersize=4, linewidth=1.2)
            axes.annotate(f" {losses[-1]:.3f}", (steps[-1], losses[-1]), color=color, fontsize=8)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    rundir.write_whole(path, buffer.getvalue())
