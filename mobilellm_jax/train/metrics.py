"""Where the numbers of a run go: the terminal, `metrics.jsonl`, TensorBoard."""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
from tensorboard.summary import Writer
from tqdm import tqdm

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.size import flops_per_token
from mobilellm_jax.storage import rundir, strict_json

_ATTENTION = "train/attention"

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
"""Dense bfloat16 peak per device in FLOP/s, by the start of its `device_kind` (makers' sheets)."""


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's dense bf16 peak in FLOP/s, or None where it is not known (CPUs)."""
    kinds = [kind for kind in PEAK_BF16_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_BF16_FLOPS[max(kinds, key=len)] if kinds else None


def model_flops_utilization(
    config: ModelConfig, seq_len: int, tokens_per_sec: float
) -> float | None:
    """Returns MFU over all devices (convention: `model/size.py`), or None on CPUs."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    return flops_per_token(config, seq_len) * tokens_per_sec / (peak * jax.device_count())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`; a last line cut short by a crash is left out.

    All values are numbers but `train/attention`, the implementation that the step ran with.
    """
    records = strict_json.read_lines(path, non_finite=True)
    for record in records:
        try:
            strict_json.get(record, "step", int)
            for name, value in record.items():
                strict_json.as_type(value, str if name == _ATTENTION else float, name)
        except strict_json.JsonError as error:
            raise UserError(f"{path}: {error} Correct the line or take it out.") from error
    return records


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard, and draws the progress bar.

    Opening it cuts `metrics.jsonl` back to `first_step`, the step that the run (re)starts from, so
    that a resumed run leaves the record of an uninterrupted one. Evaluations of that step itself go
    too: the loop makes them again, since it cannot know that they were complete.
    """

    def __init__(self, run: Path, first_step: int, last_step: int, stream: io.TextIOBase) -> None:
        path = run / rundir.METRICS
        kept = [
            r
            for r in read_metrics(path)
            if r["step"] < first_step
            or (r["step"] == first_step and any(name.startswith("train/") for name in r))
        ]
        rundir.write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = Writer(str(run / rundir.TENSORBOARD))
        self._stream = stream
        self._last_step = last_step
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            file=stream,
            disable=not stream.isatty(),
            dynamic_ncols=True,
        )
        self._printed = -math.inf

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Appends one record; it is on disk when this returns. TensorBoard gets its numbers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, text: str, eta_sec: float, *, force: bool = False) -> None:
        """Shows where the run is: on the bar or, without a terminal, as a line every 10 s."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and (force or now - self._printed >= 10):
            self._printed = now
            left = f"{int(eta_sec) // 60}:{int(eta_sec) % 60:02d} left"
            print(f"step {step}/{self._last_step}  {text}  {left}", file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        with contextlib.ExitStack() as stack:
            if not self._bar.disable:
                stack.enter_context(tqdm.external_write_mode(file=self._stream))
            print(text, file=self._stream, flush=True)


class SilentWriter(MetricsWriter):
    """What a process that is not the first writes and shows: nothing."""

    def __init__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def write(self, step: int, values: Mapping[str, float | str]) -> None: ...

    def progress(self, step: int, text: str, eta_sec: float, *, force: bool = False) -> None: ...

    def message(self, text: str) -> None: ...


def stderr() -> io.TextIOBase:
    """Returns the stream that progress goes to (looked up late, so that tests can replace it)."""
    return cast(io.TextIOBase, sys.stderr)
