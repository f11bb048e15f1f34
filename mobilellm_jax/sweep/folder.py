"""Reads and writes the folder of a sweep: the requested runs and their results.

    sweep.json               Name and config of every run that was ever requested.
    runs/NAME/               Folder of a run, as `train` writes it.
    runs/NAME/outcome.json   Result of a run that finished or failed.
    logs/NAME.log            Output of the run's process.
    trials.json              Measured seconds per step.
    slurm/                   Submitted scripts.

A killed sweep can resume from these files alone.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config, ConfigError, changed
from mobilellm_jax.preflight import MAY_CHANGE, check_same_run
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.sweep.runs import TUNED, Run
from mobilellm_jax.train.metrics import read_metrics

SWEEP, TRIALS = "sweep.json", "trials.json"
RUNS, LOGS, SLURM = "runs", "logs", "slurm"
_VERSION = 1

State = Literal["waiting", "started", "finished", "failed"]
T = TypeVar("T")


def run_folder(sweep: Path, name: str) -> Path:
    """Returns the folder of a run."""
    return sweep / RUNS / name


def log_file(sweep: Path, name: str) -> Path:
    """Returns the file to which the process of a run writes its output."""
    return sweep / LOGS / f"{name}.log"


def record_runs(sweep: Path, runs: Sequence[Run]) -> None:
    """Adds the runs to `sweep.json` and keeps the runs that are already in the file.

    Raises:
      ConfigError: if a run of the same name was started with another config.
    """
    for run in runs:
        file = run_folder(sweep, run.name) / rundir.CONFIG
        if not file.exists():
            continue
        free = MAY_CHANGE
        if run.tune_from:
            free |= {TUNED}
        if run.config.model.compute_dtype == "auto":
            free |= {"model.compute_dtype"}
        remedy = "Use its values to continue the sweep, or another --workdir."
        check_same_run(file.parent, config_lib.read_json(file), run.config, free, remedy)
    known = {run.name: run for run in [*read_runs(sweep), *runs]}
    for folder in (RUNS, LOGS):
        (sweep / folder).mkdir(parents=True, exist_ok=True)
    entries = list(map(dataclasses.asdict, known.values()))
    _write_json(sweep / SWEEP, {"version": _VERSION, "runs": entries})


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
    """Returns the run with this name, or raises a ConfigError if `sweep.json` has no such run."""
    runs = {run.name: run for run in read_runs(sweep)}
    if name not in runs:
        raise ConfigError(f"{sweep / SWEEP} has no run {name}.{config_lib.near_miss(name, runs)}")
    return runs[name]


def settled(sweep: Path, run: Run) -> Config:
    """Returns the run's config with its final learning rate.

    A run that has already started keeps its learning rate.

    Raises:
      ConfigError: if no run in `tune_from` has finished with a finite loss.
    """
    if not run.tune_from:
        return run.config
    own = run_folder(sweep, run.name) / rundir.CONFIG
    if own.exists():
        rate = config_lib.read_json(own).optimizer.peak_lr
    else:
        tuning = [tuned for tuned in read_runs(sweep) if tuned.name in run.tune_from]
        losses = {
            loss: tuned.config.optimizer.peak_lr
            for tuned in tuning
            if state_of(sweep, tuned) == "finished"
            and (loss := last_value(sweep, tuned, "validation/loss")) is not None
            and math.isfinite(loss)  # Runs that diverged do not count.
        }
        if not losses:
            raise ConfigError(
                f"{run.name} takes its learning rate from {', '.join(run.tune_from)}, and none of "
                "these runs has finished with a finite validation loss; start the sweep again."
            )
        rate = losses[min(losses)]
    return changed(run.config, {TUNED: rate})


def state_of(sweep: Path, run: Run) -> State:
    """Returns the state of a run; a run that finished with fewer steps counts as started."""
    folder = run_folder(sweep, run.name)
    outcome = rundir.read_outcome(folder)
    if outcome.get("state") == "failed":
        return "failed"
    if outcome.get("state") == "finished" and outcome.get("steps", 0) >= run.config.train.steps:
        return "finished"
    return "started" if (folder / rundir.CONFIG).exists() else "waiting"


def unfinished(sweep: Path, runs: Sequence[Run]) -> list[Run]:
    """Returns the runs that a sweep has to start or to continue."""
    return [run for run in runs if state_of(sweep, run) != "finished"]


def write_outcome(
    folder: Path, state: Literal["finished", "failed", "again"], **values: Any
) -> None:
    """Records that a run finished, failed, or was started again.

    The recorded memory peaks are the maxima over all processes that have trained the run.
    """
    old = rundir.read_outcome(folder)
    for name in ("peak_host_bytes", "peak_device_bytes"):
        known = [n[name] for n in (old, values) if isinstance(n.get(name), int)]
        values |= {name: max(known)} if known else {}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / rundir.OUTCOME, {"state": state, **values})


def last_value(sweep: Path, run: Run, name: str) -> float | None:
    """Returns the last recorded value of the metric `name` of a run, or None."""
    records = read_metrics(run_folder(sweep, run.name) / rundir.METRICS)
    return next((record[name] for record in reversed(records) if name in record), None)


def read_results(file: Path, kind: type[T]) -> dict[str, T]:
    """Reads the results that `write_results` wrote; returns {} if the file does not exist."""
    found = strict_json.read(file) if file.exists() else {}
    return {key: strict_json.as_type(value, kind, key) for key, value in found.items()}


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Writes results (dataclasses) by name to a file that `read_results` reads."""
    _write_json(file, {key: dataclasses.asdict(result) for key, result in results.items()})


def _write_json(file: Path, value: Any) -> None:
    rundir.write_whole(file, json.dumps(value, indent=1) + "\n")
