"""Writes the numbers of a run to the terminal, `metrics.jsonl` and TensorBoard, and draws them."""

import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.model.size import flops_per_token
from mobilellm_jax.startup.messages import can_show_a_bar
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.storage.picture import png, shorten
from mobilellm_jax.train.board import Board
from mobilellm_jax.train.side_records import AppendedFile, SideRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
_ATTENTION = "train/attention"
_MANY_VALIDATIONS = 8  # A line through fewer points would show a curve that was not measured.
_RECORDS, _BOARD, _BAR = f"writing {rundir.METRICS}", "writing for TensorBoard", "the progress bar"
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

    All values are numbers, except `train/attention`, which names the implementation of attention.
    JSON has no NaN and no infinity, so the file has null for them, and the function returns NaN.
    Files of earlier versions have NaN and Infinity. A line that is not a record raises a
    `UserError`.
    """
    records = strict_json.read_lines(path, _check_record, non_finite=True)
    return [{n: math.nan if v is None else v for n, v in record.items()} for record in records]


def _check_record(record: Any) -> None:
    strict_json.get(record, "step", int)
    for name, value in record.items():
        strict_json.as_type(value, str if name == _ATTENTION else float | None, name)


def _line(record: Mapping[str, Any]) -> str:
    """Returns a record as a line of JSON, with null for NaN and infinities."""
    return json.dumps(strict_json.with_null(record), allow_nan=False) + "\n"


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard, and draws the progress bar.

    The run begins after `first_step`. The constructor removes the records of later steps from
    `metrics.jsonl`, because the run will write them again. So a resumed run leaves the same records
    as an uninterrupted run. The constructor also removes evaluations of `first_step`, which may be
    incomplete; the loop repeats them. A warning names the optional packages that are not installed.
    With `silent`, the writer writes and shows nothing, as in every process except the first.

    If a method fails, a warning says so, and training goes on (`SideRecords`).
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        last_step: int,
        *,
        silent: bool = False,
        config: Config | None = None,
        side: SideRecords | None = None,
    ) -> None:
        self.side = side or SideRecords()
        self._silent = silent
        self._file = None if silent else _open_records(run, first_step)
        self._board = None
        if not silent and _has_tensorboard():
            with self.side.attempt(_BOARD):
                self._board = Board(run, config)
        self._last_step = last_step
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            disable=silent or not can_show_a_bar(),
            dynamic_ncols=True,
        )
        self._printed = -math.inf

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        closing = {_BAR: self._bar, _BOARD: self._board, _RECORDS: self._file}
        for what, each in closing.items():
            if each is not None:
                with self.side.attempt(what):
                    each.close()

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Appends a record to `metrics.jsonl` at once, and sends its numbers to TensorBoard."""
        if self._file is None:
            return
        with self.side.attempt(_RECORDS):
            self._file.append(_line({"step": step, **values}).encode())
        if self._board is not None:
            with self.side.attempt(_BOARD):
                self._board.write(step, values)

    def evaluation(self, step: int, values: Mapping[str, float], title: str = "") -> None:
        """Writes the values of an evaluation; shows names without the part before the slash."""
        self.write(step, values)
        shown = "  ".join(f"{name.partition('/')[2]} {v:.4f}" for name, v in values.items())
        self.message(f"step {step}: {title}{shown}")

    def advance(self, step: int) -> None:
        """Moves the progress bar of a terminal to this step."""
        if not self._bar.disable:
            with self.side.attempt(_BAR):
                self._bar.update(step - self._bar.n)

    def progress(
        self, step: int, text: str, left_sec: float | None, *, force: bool = False
    ) -> None:
        """Shows numbers of a step after the progress bar; without a bar, prints them every 10 s."""
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self.advance(step)
            return
        now = time.monotonic()
        if force or now - self._printed >= 10:
            self._printed = now
            left = "" if left_sec is None else f"  {_clock(left_sec)} left"
            self.message(f"step {step}/{self._last_step}  {text}{left}")

    def message(self, text: str) -> None:
        if not self._silent:
            _log.info(text)


def _clock(seconds: float) -> str:
    """Returns a time as minutes and seconds, 5:07, or with hours, 1:05:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _open_records(run: Path, first_step: int) -> AppendedFile:
    path = run / rundir.METRICS
    kept = [
        r
        for r in read_metrics(path)
        if r["step"] < first_step
        or (r["step"] == first_step and any(name.startswith("train/") for name in r))
    ]
    rundir.write_whole(path, "".join(map(_line, kept)))
    return AppendedFile(run, rundir.METRICS)


def _has_tensorboard() -> bool:
    """Returns whether TensorBoard is installed; warns of absent optional packages."""
    absent = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    if absent:
        extras, files = zip(*map(_OPTIONAL.__getitem__, absent), strict=True)
        _log.warning(
            f"{' and '.join(files)} will not be written, because {' and '.join(absent)} "
            f"cannot be imported; pip install 'mobilellm-jax[{','.join(extras)}]'."
        )
    return "tensorboard" not in absent


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
