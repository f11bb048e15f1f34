"""Writes the numbers of a run to the terminal, `metrics.jsonl` and TensorBoard, and draws them."""

import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.size import flops_per_token
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.storage.picture import png, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
_ATTENTION = "train/attention"
_MANY_VALIDATIONS = 8  # A line through fewer points would show a curve that was not measured.
# For each optional package, the extra that installs it and the file that a run writes with it.
_OPTIONAL = {
    "matplotlib": ("report", rundir.LOSS_PLOT),
    "tensorboard": ("tensorboard", f"{rundir.TENSORBOARD}/"),
}

PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""The dense bfloat16 peak in FLOP/s (makers' data sheets), by the first words of `device_kind`."""


def peak_flops(device: jax.Device) -> float | None:
    """Returns the dense bfloat16 peak of the device in FLOP/s, or None if it is not listed."""
    kinds = [kind for kind in PEAK_BF16_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_BF16_FLOPS[max(kinds, key=len)] if kinds else None


def model_flops_utilization(
    config: ModelConfig, seq_len: int, tokens_per_sec: float
) -> float | None:
    """Returns model FLOPs utilization (`model/size.py`); None if the peak is not listed."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    return flops_per_token(config, seq_len) * tokens_per_sec / (peak * jax.device_count())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`; leaves out a last line that a crash cut short.

    All values are numbers, except `train/attention`, which names the implementation of attention. A
    line that is not a record raises a `UserError`.
    """
    return strict_json.read_lines(path, _check_record, non_finite=True)


def _check_record(record: Any) -> None:
    strict_json.get(record, "step", int)
    for name, value in record.items():
        strict_json.as_type(value, str if name == _ATTENTION else float, name)


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard, and draws the progress bar.

    The run begins after `first_step`. The constructor removes the records of later steps from
    `metrics.jsonl`, because the run will write them again. So a resumed run leaves the same records
    as an uninterrupted run. The constructor also removes evaluations of `first_step`, which may be
    incomplete; the loop repeats them. A warning names the optional packages that are not installed.
    With `silent`, the writer writes and shows nothing, as in every process except the first.
    """

    def __init__(self, run: Path, first_step: int, last_step: int, *, silent: bool = False) -> None:
        self._file = None if silent else _open_records(run / rundir.METRICS, first_step)
        self._board = None if silent else _open_board(run / rundir.TENSORBOARD)
        self._last_step = last_step
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            disable=silent or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._printed = -math.inf

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for each in filter(None, (self._bar, self._board, self._file)):
            each.close()

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Appends a record to `metrics.jsonl` at once, and sends its numbers to TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board is not None and not isinstance(value, str):
                self._board.add_scalar(name, value, step)

    def evaluation(self, step: int, values: Mapping[str, float], title: str = "") -> None:
        """Writes the values of an evaluation; shows names without the part before the slash."""
        self.write(step, values)
        shown = "  ".join(f"{name.partition('/')[2]} {v:.4f}" for name, v in values.items())
        self.message(f"step {step}: {title}{shown}")

    def progress(self, step: int, text: str, eta_sec: float, *, force: bool = False) -> None:
        """Shows the progress of the run: on a terminal as a bar, else as a line every 10 s."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and (force or now - self._printed >= 10):
            self._printed = now
            left = f"{int(eta_sec) // 60}:{int(eta_sec) % 60:02d} left"
            self.message(f"step {step}/{self._last_step}  {text}  {left}")

    def message(self, text: str) -> None:
        if self._file is not None:
            _log.info(text)


def _open_records(path: Path, first_step: int) -> TextIO:
    kept = [
        r
        for r in read_metrics(path)
        if r["step"] < first_step
        or (r["step"] == first_step and any(name.startswith("train/") for name in r))
    ]
    rundir.write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))
    return path.open("a", encoding="utf-8")


def _open_board(folder: Path) -> Any:
    """Opens TensorBoard's writer if it is installed; warns of absent optional packages."""
    absent = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    if absent:
        extras, files = zip(*map(_OPTIONAL.__getitem__, absent), strict=True)
        _log.warning(
            f"{' and '.join(files)} will not be written, because {' and '.join(absent)} "
            f"cannot be imported; pip install 'mobilellm-jax[{','.join(extras)}]'."
        )
    if "tensorboard" in absent:
        return None
    from tensorboard.summary import Writer

    return Writer(str(folder))


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss (nats per token) over the steps as a PNG file.

    The legend has the last values. Every validation is a point, and a line joins the points only if
    they are many. Without matplotlib the function draws nothing; `MetricsWriter` warns of this.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    series = (
        ("train/loss", "training", "tab:blue", "-"),
        ("validation/loss", "validation", "tab:orange", "o-"),
    )

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for name, label, color, style in series:
            points = [(r["step"], r[name]) for r in records if name in r]
            if not points:
                continue
            steps, losses = zip(*points, strict=True)
            text = f"{label}: {losses[-1]:.3f} at step {steps[-1]}"
            is_dotted = len(points) < (2 if name == "train/loss" else _MANY_VALIDATIONS)
            axes.plot(
                steps,
                losses,
                "o" if is_dotted else style,
                color=color,
                label=text,
                markersize=4,
                linewidth=1.2,
            )
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=shorten(title, 60))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()

    rundir.write_whole(path, png(draw, (7, 4), 120))
