"""Turns the metrics of steps, which are device scalars, into records and lines for the user.

The host can read a metric only after its step has ended. So the host starts the next step first and
reads the metric while this next step runs.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.train.metrics import MetricsWriter, model_flops_utilization
from mobilellm_jax.train.step import Batch, StepMetrics


@dataclasses.dataclass
class Meter:
    """Measures targets per second, and the share of the time that the host waits for data."""

    targets: float = 0.0
    waited_sec: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.waited_sec += time.perf_counter() - began
        return batch

    def read(self) -> tuple[float, float]:
        """Returns targets per second and the share of waiting time since the last `reset`."""
        elapsed = time.perf_counter() - self.started
        rates = self.targets / elapsed, self.waited_sec / elapsed
        self.reset()
        return rates

    def reset(self) -> None:
        self.targets, self.waited_sec, self.started = 0.0, 0.0, time.perf_counter()


class Reporter:
    """Reads the metrics of every step, writes some of them, and reports every skipped step."""

    def __init__(self, config: Config, writer: MetricsWriter) -> None:
        self.meter = Meter()
        self.bad = range(0)  # Latest consecutive steps that were not finite; may be empty.
        self._config = config
        self._writer = writer
        self._pending: tuple[int, StepMetrics] | None = None
        self._first_step: int | None = None
        self._began = time.perf_counter()
        self._told_of_no_targets = False

    @property
    def diverged(self) -> bool:
        return len(self.bad) >= self._config.train.max_bad_steps

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Keeps the metrics of this step, and reports the metrics of the previous step."""
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._record(*pending)

    def flush(self) -> None:
        if self._pending is not None:
            self._record(*self._pending)
            self._pending = None

    def _record(self, step: int, metrics: StepMetrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        train = self._config.train
        self.bad = range(step - int(values["bad_steps"]) + 1, step + 1)
        self.meter.targets += values["targets"]
        due = step == 1 or step % train.log_every == 0 or step == train.steps
        rates: dict[str, float] = {}
        if self._first_step is None:
            # The first step compiles, so the rates do not include its time.
            self._first_step, self._began = step, time.perf_counter()
            self.meter.reset()
        elif due:
            tokens_per_sec, data_wait = self.meter.read()
            rates = {"train/tokens_per_sec": tokens_per_sec, "train/data_wait": data_wait}
            mfu = model_flops_utilization(
                self._config.model, self._config.data.seq_len, tokens_per_sec
            )
            rates |= {} if mfu is None else {"train/mfu": mfu}
        if due or values["skipped"]:
            self._writer.write(step, self._record_of(step, values) | rates)
        if values["skipped"]:
            self._writer.message(_skip_line(self._config, step, values))
        if not values["targets"]:
            self._tell_of_no_targets(step)
        self._writer.advance(step)
        if due:
            self._show(step, values, rates)

    def _record_of(self, step: int, values: Mapping[str, float]) -> dict[str, float | str]:
        """Returns the record of a step; leaves out numbers that are not finite.

        A batch without targets has neither a loss nor a meaningful gradient.
        """
        names = ("loss", "grad_norm", "learning_rate") if values["targets"] else ("learning_rate",)
        record: dict[str, float | str] = {
            f"train/{name}": values[name] for name in names if math.isfinite(values[name])
        }
        record["train/attention"] = self._config.model.attention
        if values["skipped"]:
            record |= {
                "train/skipped_steps": values["skipped_steps"],
                "train/bad_steps": values["bad_steps"],
                "train/first_sample": float((step - 1) * self._config.train.global_batch),
            }
        return record

    def _tell_of_no_targets(self, step: int) -> None:
        if not self._told_of_no_targets:
            self._told_of_no_targets = True
            batch = self._config.train.global_batch
            self._writer.message(
                f"NO TARGETS in step {step} (samples {(step - 1) * batch} to {step * batch - 1}): "
                "loss masks exclude all tokens of its batch, so the step has no loss. The run does "
                "not report later steps of this kind."
            )

    def _show(self, step: int, values: Mapping[str, float], rates: Mapping[str, float]) -> None:
        assert self._first_step is not None, "a step has been read"
        done, left = step - self._first_step, self._config.train.steps - step
        left_sec = (time.perf_counter() - self._began) / done * left if done and left else None
        text = f"loss {values['loss']:.4f}" if values["targets"] else "no targets"
        if rates:
            mfu = "MFU n/a (peak not listed)"
            if "train/mfu" in rates:
                mfu = f"MFU {rates['train/mfu']:.1%}"
            text += (
                f"  {rates['train/tokens_per_sec']:,.0f} tokens/s  {mfu}"
                f"  data wait {rates['train/data_wait']:.1%}"
            )
        self._writer.progress(step, text, left_sec, force=not left)


def _skip_line(config: Config, step: int, values: Mapping[str, float]) -> str:
    numbers = (
        f"loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g}, update norm "
        f"{values['update_norm']:.6g}"
    )
    train = config.train
    first = (step - 1) * train.global_batch
    samples = f"samples {first} to {first + train.global_batch - 1}"
    if values["spike"]:
        what = f"a spike (train.spike_factor={train.spike_factor})"
    else:
        what = f"not finite ({values['bad_steps']:.0f} of train.max_bad_steps={train.max_bad_steps}"
        what += " in a row)"
    return (
        f"SKIPPED step {step}, {what}: {numbers}; {samples}; nothing was updated; "
        f"{values['skipped_steps']:.0f} skipped in this run"
    )
