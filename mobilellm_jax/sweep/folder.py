"""Reads and writes the folder of a sweep: the requested runs and their results.

    sweep.json               name and config of every run that was ever requested
    runs/NAME/               run folders, as `train` makes them
    runs/NAME/outcome.json   written when a run finishes or fails
    logs/NAME.log            output of the run's process
    trials.json              measured seconds per step
    slurm/                   scripts as they were submitted

A killed sweep resumes from these files alone.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.preflight import MAY_CHANGE, check_same_run
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.train.metrics import read_metrics

SWEEP, TRIALS = "sweep.json", "trials.json"
RUNS, LOGS, SLURM = "runs", "logs", "slurm"
_VERSION = 1
_TUNED = "optimizer.peak_lr"

State = Literal["waiting", "started", "finished", "failed"]


def run_folder(sweep: Path, name: str) -> Path:
    """Returns the folder of a run."""
    return sweep / RUNS / name


def log_file(sweep: Path, name: str) -> Path:
    """Returns the file that a run's process writes its output to."""
    return sweep / LOGS / f"{name}.log"


def record_runs(sweep: Path, runs: Sequence[Run]) -> None:
    """Adds the runs to `sweep.json` and keeps the runs that are already in the file.

    Raises:
      ConfigError: if a run of the same name was started with another config.
    """
    for run in runs:
        _check_started(sweep, run)
    known = {run.name: run for run in read_runs(sweep)} | {run.name: run for run in runs}
    entries = [
        {
            "name": run.name,
            "config": dataclasses.asdict(run.config),
            "tune_from": list(run.tune_from),
        }
        for run in known.values()
    ]
    for folder in (RUNS, LOGS):
        (sweep / folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": _VERSION, "runs": entries}, indent=1) + "\n"
    rundir.write_whole(sweep / SWEEP, text)


def read_runs(sweep: Path) -> list[Run]:
    """Returns the runs in `sweep.json`, or an empty list if the file does not exist.

    Raises:
      ConfigError: if `record_runs` did not write the file.
    """
    file = sweep / SWEEP
    if not file.exists():
        return []
    try:
        content = strict_json.read(file)
        version = strict_json.get(content, "version", int)
        if version != _VERSION:
            raise ConfigError(
                f"{file}: version={version}, and this program reads {_VERSION}; sweep into another "
                "--workdir."
            )
        runs = []
        for entry in strict_json.get(content, "runs", list[dict[str, Any]]):
            name = strict_json.get(entry, "name", str)
            if Path(name).name != name:
                raise strict_json.JsonError(f"name={name!r} must name a folder in {RUNS}/.")
            runs.append(
                Run(
                    name=name,
                    config=config_lib.from_json(json.dumps(entry.get("config"))),
                    tune_from=tuple(strict_json.get(entry, "tune_from", list[str])),
                )
            )
        return runs
    except strict_json.JsonError as error:
        raise ConfigError(f"{file}: {error}") from error


def find_run(sweep: Path, name: str) -> Run:
    """Returns the run with this name.

    Raises:
      ConfigError: if `sweep.json` does not contain the run.
    """
    runs = {run.name: run for run in read_runs(sweep)}
    if name not in runs:
        raise ConfigError(f"{sweep / SWEEP} has no run {name}.{config_lib.near_miss(name, runs)}")
    return runs[name]


def settled(sweep: Path, run: Run) -> Config:
    """Returns the run's config with its final learning rate.

    The learning rate is chosen only once. A run that has already started keeps its learning rate.

    Raises:
      ConfigError: if the rate must be chosen and no run in `tune_from` has finished with a finite
        loss.
    """
    if not run.tune_from:
        return run.config
    own = run_folder(sweep, run.name) / rundir.CONFIG
    if own.exists():
        rate = config_lib.read_json(own).optimizer.peak_lr
    else:
        losses = {
            loss: find_run(sweep, name).config.optimizer.peak_lr
            for name in run.tune_from
            if state_of(sweep, name) == "finished"
            and (loss := last_validation(run_folder(sweep, name))) is not None
            and math.isfinite(loss)  # leaves out runs that diverged
        }
        if not losses:
            raise ConfigError(
                "no run with a finite validation loss has finished among "
                f"{', '.join(run.tune_from)}, so that {run.name} has no learning rate; start the "
                "sweep again."
            )
        rate = losses[min(losses)]
    optimizer = dataclasses.replace(run.config.optimizer, peak_lr=rate)
    return dataclasses.replace(run.config, optimizer=optimizer)


def state_of(sweep: Path, name: str, steps: int = 0) -> State:
    """Returns the state of a run; a finish before step `steps` counts as started."""
    folder = run_folder(sweep, name)
    outcome = read_outcome(folder)
    if outcome.get("state") == "failed":
        return "failed"
    if outcome.get("state") == "finished" and outcome.get("steps", 0) >= steps:
        return "finished"
    return "started" if (folder / rundir.CONFIG).exists() else "waiting"


def read_outcome(folder: Path) -> dict[str, Any]:
    """Returns the content of `outcome.json` in a run folder, or {} if the file does not exist."""
    file = folder / rundir.OUTCOME
    found = strict_json.read(file) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def write_outcome(
    folder: Path, state: Literal["finished", "failed", "again"], **values: Any
) -> None:
    """Records that a run finished, failed, or was started again.

    The recorded memory peaks are the maxima over all processes of the run so far.
    """
    old = read_outcome(folder)
    peaks = ("peak_host_bytes", "peak_device_bytes")
    for name in peaks:
        known = [n[name] for n in (old, values) if isinstance(n.get(name), int)]
        values |= {name: max(known)} if known else {}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"state": state, **values}, indent=1) + "\n"
    rundir.write_whole(folder / rundir.OUTCOME, text)


def last_step(folder: Path) -> int:
    """Returns the last step in the metrics of a run, or 0 if the run has no metrics."""
    return max((int(r["step"]) for r in read_metrics(folder / rundir.METRICS)), default=0)


def last_validation(folder: Path) -> float | None:
    """Returns the last validation loss in the metrics of a run."""
    records = read_metrics(folder / rundir.METRICS)
    losses = [r["validation/loss"] for r in records if "validation/loss" in r]
    return float(losses[-1]) if losses else None


def _check_started(sweep: Path, run: Run) -> None:
    file = run_folder(sweep, run.name) / rundir.CONFIG
    if not file.exists():
        return
    old = config_lib.read_json(file)
    free = MAY_CHANGE | (frozenset({_TUNED}) if run.tune_from else frozenset())
    if run.config.model.compute_dtype == "auto":
        free |= {"model.compute_dtype"}
    remedy = "Use its values to continue the sweep, or another --workdir."
    check_same_run(file.parent, old, run.config, free, remedy)
