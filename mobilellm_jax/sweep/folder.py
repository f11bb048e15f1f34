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
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config, ConfigError, changed
from mobilellm_jax.errors import UserError
from mobilellm_jax.preflight import check_same_run
from mobilellm_jax.run_record import MAY_CHANGE, RunRecord, State, read_record
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.storage.outputs import BELONGS_TOGETHER, own_folder
from mobilellm_jax.sweep.runs import TUNED, Run

SWEEP, TRIALS = "sweep.json", "trials.json"
RUNS, LOGS, SLURM = "runs", "logs", "slurm"
ENDED: tuple[State, ...] = ("finished", "diverged")
_VERSION = 1

# Fields that a run does not take over from the run that found the learning rate.
_OWN = MAY_CHANGE | {"train.seed", "data.seed"}

T = TypeVar("T")

_log = logging.getLogger(__name__)


def check_sweep(sweep: Path) -> None:
    """Raises a `UserError` if the folder cannot be written, or holds files of other commands."""

    def is_sweep(folder: Path) -> bool:
        return (folder / SWEEP).is_file()

    own_folder("--workdir", sweep, "a sweep", is_sweep, BELONGS_TOGETHER)


def run_folder(sweep: Path, name: str) -> Path:
    """Returns the folder of a run."""
    return sweep / RUNS / name


def log_file(sweep: Path, name: str) -> Path:
    """Returns the file to which the process of a run writes its output."""
    return sweep / LOGS / f"{name}.log"


def record_runs(sweep: Path, runs: Sequence[Run]) -> None:
    """Adds the runs to `sweep.json` and keeps the entries that are already in the file.

    A warning names the runs whose learning rate has followed another schedule before.

    Raises:
      ConfigError: if a run of the same name was started with another config or has taken more
        steps, or if a learning rate would be chosen among runs that are not comparable.
      UserError: if the folder of a run is damaged.
    """
    records = {run.name: read_record(run_folder(sweep, run.name)) for run in runs}
    for run in runs:
        _check_config(sweep, records[run.name], run)
    _check_length(runs, records)
    _check_schedules(sweep, runs, records)
    entries = _entries(sweep) | {run.name: dataclasses.asdict(run) for run in runs}
    for folder in (RUNS, LOGS):
        (sweep / folder).mkdir(parents=True, exist_ok=True)
    _write_json(sweep / SWEEP, {"version": _VERSION, "runs": list(entries.values())})


def _check_config(sweep: Path, record: RunRecord, run: Run) -> None:
    if record.config is None:
        return
    free = MAY_CHANGE
    if run.config.model.compute_dtype == "auto":
        free |= {"model.compute_dtype"}
    remedy = "Use its values to continue the sweep, or another --workdir."
    check_same_run(record.folder, record.config, settled(sweep, run), free, remedy)


def _check_length(runs: Sequence[Run], records: Mapping[str, RunRecord]) -> None:
    longer = {run: records[run.name].last_step for run in runs
              if records[run.name].state(run.config.train.steps) == "longer"}  # fmt: skip
    if not longer:
        return
    lines = "\n".join(
        f"  {run.name}: {taken} steps taken, train.steps={run.config.train.steps} here"
        for run, taken in longer.items()
    )
    steps = {run.config.train.steps for run in runs}
    enough = f"={max(longer.values())}" if len(steps) == 1 else " with a larger number"
    raise ConfigError(
        "runs of this sweep are longer than asked for, and a loss on the way is not the loss of a "
        f"shorter run, whose learning rate falls sooner:\n{lines}\n"
        f"Use --config.train.steps{enough}, or another --workdir."
    )


def _check_schedules(sweep: Path, runs: Sequence[Run], records: Mapping[str, RunRecord]) -> None:
    """Warns of runs that followed two schedules.

    Raises:
      ConfigError: if a new run would take the best learning rate of runs with different schedules.
    """
    started = [run for run in runs if records[run.name].config is not None]
    others = {
        run.name: step
        for run in started
        if (step := records[run.name].other_schedule_until(settled(sweep, run)))
    }
    failed = {name for name, record in records.items() if record.outcome.get("state") == "failed"}
    for run in runs:
        tuning = {others.get(name, 0) for name in run.tune_from if name not in failed}
        if len(tuning) > 1 and records[run.name].config is None:
            raise ConfigError(
                f"{run.name} takes its learning rate from the best of {', '.join(run.tune_from)}, "
                "and some of these have followed the schedule of another train.steps at first, so "
                "they are not comparable. Use another --workdir."
            )
    if others:
        names = ", ".join(f"{name} (until step {step})" for name, step in others.items())
        _log.warning(
            f"Runs go on with another schedule of the learning rate: {names}. They are not "
            "comparable with runs that had one schedule, and `mobilellm report` shows them as "
            "models of their own. For comparable runs, use another --workdir."
        )


def check_data(sweep: Path, run: Run, fingerprint: str) -> None:
    """Raises a ConfigError if the run in the folder was trained on data with another fingerprint.

    The data can differ although the run has the same name: somebody has prepared other data under
    the same path, or has named another path.
    """
    record = read_record(run_folder(sweep, run.name))
    if record.data not in (None, fingerprint):
        raise ConfigError(
            f"{record.folder} was trained on other data (fingerprint {record.data}) than "
            f"data.path={run.config.data.path!r} holds now ({fingerprint}). Use the same data to "
            "continue the sweep, or another --workdir."
        )


def read_runs(sweep: Path, names: Iterable[str]) -> list[Run]:
    """Returns the runs in `sweep.json` with these names; the file and each run may be missing.

    Other entries of the file are not checked, because another version may have written them.

    Raises:
      ConfigError: if `record_runs` did not write the file, or an entry is damaged.
    """
    entries = _entries(sweep)
    runs = []
    for name in names:
        if name not in entries:
            continue
        try:
            runs.append(
                Run(
                    name=name,
                    config=config_lib.from_json(json.dumps(entries[name].get("config"))),
                    tune_from=tuple(strict_json.get(entries[name], "tune_from", list[str])),
                    model=strict_json.get(entries[name], "model", str, ""),
                )
            )
        except UserError as error:
            raise ConfigError(f"{sweep / SWEEP}, run {name}: {error}") from error
    return runs


def _entries(sweep: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of `sweep.json` by the name of the run."""
    file = sweep / SWEEP
    if not file.exists():
        return {}
    try:
        content = strict_json.read(file)
        version = strict_json.get(content, "version", int)
        if version != _VERSION:
            raise ConfigError(
                f"{file}: version={version}, and this program reads {_VERSION}; sweep into another "
                "--workdir."
            )
        entries = strict_json.get(content, "runs", list[dict[str, Any]])
        named = {strict_json.get(entry, "name", str): entry for entry in entries}
        for name in named:
            if Path(name).name != name:
                raise strict_json.JsonError(f"name={name!r} must name a folder in {RUNS}/.")
        return named
    except strict_json.JsonError as error:
        raise ConfigError(f"{file}: {error}") from error


def find_run(sweep: Path, name: str) -> Run:
    """Returns the run with this name, or raises a ConfigError if `sweep.json` has no such run."""
    for run in read_runs(sweep, [name]):
        return run
    hint = config_lib.near_miss(name, _entries(sweep))
    raise ConfigError(f"{sweep / SWEEP} has no run {name}.{hint}")


def settled(sweep: Path, run: Run) -> Config:
    """Returns the run's config with its final learning rate, and what the file computes from it.

    A run that has already started keeps its learning rate.

    Raises:
      ConfigError: if no run in `tune_from` has finished with a finite loss.
    """
    if not run.tune_from:
        return run.config
    tuning = read_runs(sweep, run.tune_from)
    own = run_folder(sweep, run.name) / rundir.CONFIG
    if own.exists():
        rate = config_lib.read_json(own).optimizer.peak_lr
    else:
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
    change: dict[str, Any] = {TUNED: rate}
    for tuned in tuning:
        if tuned.config.optimizer.peak_lr == rate:
            # The config file may compute other fields from the rate.
            computed = config_lib.changed_fields(run.config, tuned.config)
            change |= {name: new for name, (_, new) in computed.items() if name not in _OWN}
    return changed(run.config, change)


def state_of(sweep: Path, run: Run) -> State:
    """Returns the state of a run; a run has ended only if its process has recorded the outcome."""
    record = read_record(run_folder(sweep, run.name))
    state = record.state(run.config.train.steps)
    return state if record.outcome or state not in ENDED else "started"


def unfinished(sweep: Path, runs: Sequence[Run]) -> list[Run]:
    """Returns the runs that a sweep has to start or to continue."""
    return [run for run in runs if state_of(sweep, run) not in ENDED]


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
    """Returns the last recorded value of the metric `name` of a run, or None.

    The result is also None if the records cannot be read, which may happen while the run goes on.
    """
    try:
        records = read_record(run_folder(sweep, run.name)).records
    except UserError:
        return None
    return next((record[name] for record in reversed(records) if name in record), None)


def read_results(file: Path, kind: type[T]) -> dict[str, T]:
    """Reads the results that `write_results` wrote; returns {} if the file does not exist.

    Results can be measured again. So if the file is damaged, the function warns and returns {}.
    """
    try:
        found = strict_json.read(file) if file.exists() else {}
        entries = strict_json.as_type(found, dict[str, Any], file.name)
        return {key: strict_json.as_type(value, kind, key) for key, value in entries.items()}
    except UserError as error:
        _log.warning(f"Not used: {error} The results in {file} will be measured again.")
        return {}


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Writes results (dataclasses) by name to a file that `read_results` reads."""
    _write_json(file, {key: dataclasses.asdict(result) for key, result in results.items()})


def _write_json(file: Path, value: Any) -> None:
    rundir.write_whole(file, json.dumps(value, indent=1) + "\n")
