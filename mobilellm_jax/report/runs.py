"""Reads run folders for a report."""

import dataclasses
import glob as globbing
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from mobilellm_jax.config import Config, ConfigError, changed
from mobilellm_jax.errors import UserError
from mobilellm_jax.run_record import RunRecord, State, read_record
from mobilellm_jax.storage import file_kind, rundir
from mobilellm_jax.storage.user_path import expand_home

_RUNS = "runs"  # Subfolder of a sweep that contains the runs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The results of one run."""

    folder: Path
    config: Config
    state: State
    training: dict[int, float]  # Training loss in nats per token, by step.
    validation: dict[int, float]  # Validation loss in nats per token, by step.
    last_step: int  # Last step with a recorded loss.
    other_schedule_until: int  # Last step with the schedule of another `train.steps`, or 0.
    data: str | None  # Fingerprint of the data, if it is known.
    bpb: float | None  # Last recorded validation loss in bits per byte.
    tokens_per_sec: float | None  # Median speed of training.
    peak_bytes: int | None  # Peak memory during training.
    peak_of: str  # Kind of this memory: "device", "host process" or "" (unknown).
    failed: str  # Reason of the failure; "" if the run did not fail.

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended with a finite validation loss."""
        return self.state == "finished"

    @property
    def loss(self) -> float:
        """The validation loss at the end of a finished run."""
        return self.validation[self.config.train.steps]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A folder that the report leaves out."""

    folder: Path
    reason: str


def read_runs(pattern: str) -> tuple[list[Measured], list[Unreadable]]:
    """Reads the runs in all matching folders; for the folder of a sweep, reads all its runs.

    The second list has the folders that cannot be read, for example because a newer version wrote
    them.

    Raises:
      ConfigError: if no run folder matches, or if none of the matching folders can be read.
    """
    folders: list[Path] = []
    runs: list[Measured] = []
    unreadable: list[Unreadable] = []
    for folder in _matching(pattern):
        if folder.is_symlink() and not folder.exists():
            unreadable.append(Unreadable(folder, f"{folder} {file_kind.absence(folder)}."))
        inside = sorted((folder / _RUNS).glob("*")) if not (folder / rundir.CONFIG).exists() else []
        folders += inside or [folder]
    for folder in folders:
        if not (folder / rundir.CONFIG).exists():
            continue
        try:
            runs.append(_measured(read_record(folder)))
        except UserError as error:
            unreadable.append(Unreadable(folder, str(error)))
    if unreadable and not runs:
        lines = "\n".join(each.reason for each in unreadable)
        raise ConfigError(f"--runs={pattern} matches no run folder that can be read:\n{lines}")
    if not runs:
        raise ConfigError(
            f"--runs={pattern} matches no run folder; a run folder holds {rundir.CONFIG}. Put the "
            "pattern in quotes: --runs='runs/tiny/runs/*'."
        )
    return _with_names_of_data(runs), unreadable


def _matching(pattern: str) -> list[Path]:
    """Returns the matches of a pattern; brackets may also be part of a name."""
    path = expand_home("--runs", pattern)
    names = globbing.glob(path) or globbing.glob(path.replace("[", "[[]"))
    return [Path(name) for name in sorted(names)]


def _measured(record: RunRecord) -> Measured:
    config, outcome = record.config, record.outcome
    if config is None:
        raise UserError(f"{record.folder / rundir.CONFIG} was deleted.")
    by_device = outcome.get("peak_device_bytes")
    peak = by_device or outcome.get("peak_host_bytes")
    bpb = list(record.values("validation/bpb").values())
    rate = "train/tokens_per_sec"
    rates = [float(each[rate]) for each in record.records if rate in each]
    state = record.state(config.train.steps)
    return Measured(
        folder=record.folder,
        config=config,
        state=state,
        training=_finite(record.values("train/loss")),
        validation=_finite(record.values("validation/loss")),
        last_step=record.last_step,
        other_schedule_until=record.other_schedule_until(config),
        data=record.data,
        bpb=bpb[-1] if bpb else None,
        tokens_per_sec=statistics.median(rates) if rates else None,
        peak_bytes=peak if isinstance(peak, int) else None,
        peak_of="" if peak is None else "device" if by_device else "host process",
        failed=record.reason if state == "failed" else "",
    )


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _with_names_of_data(runs: Sequence[Measured]) -> list[Measured]:
    """Sets `data.path` so that two runs have the same path exactly if they have the same data.

    Two paths can lead to the same data, and a folder can be prepared again between two runs. A run
    without checkpoints keeps its path, because nothing else is known about its data.
    """
    names: dict[str, str] = {}  # Maps a fingerprint of data to the path that is shown for it.
    for run in runs:
        if run.data is not None and run.data not in names:
            path = run.config.data.path
            again = path in names.values()
            names[run.data] = f"{path} (fingerprint {run.data[:8]})" if again else path
    return [
        dataclasses.replace(run, config=changed(run.config, {"data.path": names[run.data]}))
        if run.data is not None
        else run
        for run in runs
    ]
