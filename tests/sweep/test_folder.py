import dataclasses
import json
import math
from pathlib import Path

import pytest

from mobilellm_jax.config import Config, ConfigError, to_json
from mobilellm_jax.config.recipe import fixed
from mobilellm_jax.storage import rundir
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import Run, with_seeds

BASE = Config()
RUNS = with_seeds({"a": fixed(BASE)}, 2, [1e-3, 1e-2, 1e-1])


def finish(sweep: Path, name: str, loss: float, steps: int = BASE.train.steps) -> None:
    folder = files.run_folder(sweep, name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(BASE))
    write_loss(folder, steps, loss)
    files.write_outcome(folder, "finished", steps=steps)


def write_loss(folder: Path, step: int, loss: float = 2.0) -> None:
    record = {"step": step, "validation/loss": loss}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_runs_come_back(tmp_path: Path) -> None:
    files.record_runs(tmp_path, RUNS)
    assert files.read_runs(tmp_path, [run.name for run in RUNS]) == RUNS
    assert files.find_run(tmp_path, "a-s1") == RUNS[-1]
    with pytest.raises(ConfigError, match="has no run a-s2. Did you mean a-s1?"):
        files.find_run(tmp_path, "a-s2")


def test_more_runs_are_added_and_none_is_forgotten(tmp_path: Path) -> None:
    files.record_runs(tmp_path, RUNS)
    other = Run(name="b-s0", config=BASE)
    files.record_runs(tmp_path, [other])
    names = [*(run.name for run in RUNS), "b-s0"]
    assert files.read_runs(tmp_path, names) == [*RUNS, other]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2, "runs": []}', "version=2"),
        ('{"version": 1}', "runs is missing"),
        ('{"version": 1, "runs": [{"name": "../x", "tune_from": [], "config": {}}]}', "folder"),
        ('{"version": 1, "runs": [{"name": "x", "tune_from": [], "config": 3}]}', "object"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_that_no_sweep_wrote(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        files.read_runs(tmp_path, ["x"])


def test_states(tmp_path: Path) -> None:
    run = RUNS[0]
    folder = files.run_folder(tmp_path, run.name)
    assert files.state_of(tmp_path, run) == "waiting"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(BASE))
    assert files.state_of(tmp_path, run) == "started"
    files.write_outcome(folder, "failed", reason="x", peak_host_bytes=7)
    assert files.state_of(tmp_path, run) == "failed"
    files.write_outcome(folder, "again")
    assert files.state_of(tmp_path, run) == "started"
    steps = run.config.train.steps
    write_loss(folder, steps - 1)
    files.write_outcome(folder, "finished", steps=steps - 1, peak_host_bytes=5)
    assert files.state_of(tmp_path, run) == "started"  # extended by a step
    write_loss(folder, steps)
    files.write_outcome(folder, "finished", steps=steps)
    assert files.state_of(tmp_path, run) == "finished"
    write_loss(folder, steps + 1)
    assert files.state_of(tmp_path, run) == "longer"
    assert rundir.read_outcome(folder)["peak_host_bytes"] == 7  # of all its processes


def test_the_best_rate_is_that_of_the_lowest_loss(tmp_path: Path) -> None:
    files.record_runs(tmp_path, RUNS)
    *tuning, late = RUNS
    with pytest.raises(
        ConfigError, match="none of these runs has finished with a finite validation loss"
    ):
        files.settled(tmp_path, late)
    for run, loss in zip(tuning, (3.0, 2.0, 2.5), strict=True):
        finish(tmp_path, run.name, loss)
    assert files.settled(tmp_path, late).optimizer.peak_lr == 1e-2
    finish(tmp_path, tuning[0].name, math.nan)  # diverged
    assert files.settled(tmp_path, late).optimizer.peak_lr == 1e-2
    files.write_outcome(files.run_folder(tmp_path, tuning[1].name), "failed")
    assert files.settled(tmp_path, late).optimizer.peak_lr == 1e-1
    # A run keeps the choice that it was started with.
    own = files.run_folder(tmp_path, late.name)
    own.mkdir(exist_ok=True)
    optimizer = dataclasses.replace(BASE.optimizer, peak_lr=1e-3)
    (own / "config.json").write_text(to_json(dataclasses.replace(BASE, optimizer=optimizer)))
    assert files.settled(tmp_path, late).optimizer.peak_lr == 1e-3


def test_a_started_run_keeps_its_config(tmp_path: Path) -> None:
    run = Run(name="a-s0", config=BASE)
    folder = files.run_folder(tmp_path, run.name)
    folder.mkdir(parents=True)
    # These fields are settled by `train`, and these fields may change.
    model = dataclasses.replace(BASE.model, compute_dtype="float32", attention="xla")
    train = dataclasses.replace(BASE.train, steps=10_000)
    settled = dataclasses.replace(BASE, model=model, train=train)
    (folder / "config.json").write_text(to_json(settled))
    files.record_runs(tmp_path, [run])
    wide = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, ffn_dim=512))
    with pytest.raises(ConfigError, match="model.ffn_dim: 1536 there, 512 here"):
        files.record_runs(tmp_path, [Run(name="a-s0", config=wide)])
    assert files.read_runs(tmp_path, [run.name]) == [run]
