"""Reads run folders for a report."""

import dataclasses
import glob as globbing
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.metrics import read_metrics

_RUNS = "runs"  # Subfolder of a sweep that contains the runs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The results of one run."""

    folder: Path
    config: Config
    validation: dict[int, float]  # Validation loss in nats per token, by step.
    last_step: int  # Last step with a recorded loss.
    bpb: float | None  # Last recorded validation loss in bits per byte.
    tokens_per_sec: float | None  # Median speed of training.
    peak_bytes: int | None  # Peak memory during training.
    peak_of: str  # Kind of this memory: "device", "host process" or "" (unknown).
    failed: str  # Reason of the failure; "" if the run did not fail.

    @property
    def is_finished(self) -> bool:
        """Whether the run has a finite validation loss at its last step."""
        return math.isfinite(self.validation.get(self.config.train.steps, math.nan))

    @property
    def has_diverged(self) -> bool:
        """Whether the run has an infinite or NaN validation loss at its last step."""
        return self.config.train.steps in self.validation and not self.is_finished

    @property
    def loss(self) -> float:
        """The validation loss at the end of a finished run."""
        return self.validation[self.config.train.steps]


def read_runs(pattern: str) -> list[Measured]:
    """Reads the runs in all matching folders; for the folder of a sweep, reads all its runs.

    Raises:
      ConfigError: if no run folder matches.
    """
    folders: list[Path] = []
    for name in sorted(globbing.glob(pattern)):
        folder = Path(name)
        inside = sorted((folder / _RUNS).glob("*")) if not (folder / rundir.CONFIG).exists() else []
        folders += inside or [folder]
    runs = [_read(f) for f in folders if (f / rundir.CONFIG).is_file()]
    if not runs:
        raise ConfigError(
            f"--runs={pattern} matches no run folder; a run folder holds {rundir.CONFIG}. Put the "
            "pattern in quotes: --runs='runs/tiny/runs/*'."
        )
    return runs


def _read(folder: Path) -> Measured:
    records = read_metrics(folder / rundir.METRICS)
    validation = _series(records, "validation/loss")
    outcome = rundir.read_outcome(folder)
    by_device = outcome.get("peak_device_bytes")
    peak = by_device or outcome.get("peak_host_bytes")
    bpb = [float(r["validation/bpb"]) for r in records if "validation/bpb" in r]
    rates = [float(r["train/tokens_per_sec"]) for r in records if "train/tokens_per_sec" in r]
    return Measured(
        folder=folder,
        config=config_lib.read_json(folder / rundir.CONFIG),
        validation=validation,
        last_step=max([*validation, *_series(records, "train/loss")], default=0),
        bpb=bpb[-1] if bpb else None,
        tokens_per_sec=statistics.median(rates) if rates else None,
        peak_bytes=peak if isinstance(peak, int) else None,
        peak_of="" if peak is None else "device" if by_device else "host process",
        failed=str(outcome.get("reason", "unknown")) if outcome.get("state") == "failed" else "",
    )


def _series(records: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    return {int(r["step"]): float(r[name]) for r in records if name in r}
