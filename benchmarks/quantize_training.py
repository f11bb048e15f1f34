r"""Draws validation losses of several runs of quantization-aware training in one picture.

    for scheme in none w4a8g32 w4a8g128; do
      mobilellm train --config=configs/quantize/quickstart_w4a8.py \
        --config.quantize.scheme=$scheme --workdir=runs/qat_$scheme
    done
    python benchmarks/quantize_training.py --float=qat_none --output=docs/quantize_training.png \
      runs/qat_none runs/qat_w4a8g32 runs/qat_w4a8g128

The first point of a run is the quantized model before training. The script prints how much of the
gap to the float model's loss the training closes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.picture import png
from mobilellm_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main() -> None:
    """Draws the picture and prints the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--float", required=True, help="name of the run that is not quantized")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    curves = {run.name: _losses(run) for run in arguments.runs}
    start = curves[arguments.float][0][1]
    for name, points in curves.items():
        losses = [loss for _, loss in points]
        line = f"{name:20}{losses[0]:8.4f} -> {losses[-1]:.4f}"
        if name != arguments.float:
            line += f"  {(losses[0] - losses[-1]) / (losses[0] - start):.0%} of the gap"
        print(line)
    picture = png(lambda figure: _draw(figure, curves, start), (7, 4), 100)
    rundir.write_whole(arguments.output, picture)


def _draw(figure: "Figure", curves: dict[str, list[tuple[int, float]]], start: float) -> None:
    axes = figure.subplots()
    axes.axhline(start, color="gray", linestyle=":", label="float32, before")
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        label = f"{name}: {losses[-1]:.4f}"
        axes.plot(steps, losses, "o-", label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _losses(run: Path) -> list[tuple[int, float]]:
    records = read_metrics(run / rundir.METRICS)
    return [(int(r["step"]), r["validation/loss"]) for r in records if "validation/loss" in r]


if __name__ == "__main__":
    main()
