"""Submits the array's script to a Slurm of shell scripts, and runs it as Slurm would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.config.recipe import fixed
from mobilellm_jax.sweep import slurm
from mobilellm_jax.sweep.runs import with_seeds

VARIANTS = {name: fixed(Config()) for name in ("a", "b")}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder where programs note their arguments. Job numbers count from 100."""
    log = tmp_path / "cluster"
    log.mkdir()
    programs = {
        "sbatch": f'echo "$@" >>{log}/sbatch; echo "$((99 + $(wc -l <{log}/sbatch)));main"',
        "squeue": f'echo "$@" >>{log}/squeue; cat {log}/queue 2>/dev/null || exit 1',
        "scontrol": f'echo "$@" >>{log}/scontrol',
    }
    for name, body in programs.items():
        program = log / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.rename(tmp_path / name)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return log


def stub_python(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_an_array_of_all_runs(
    cluster: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sweep = tmp_path / "my sweep"
    arguments = "--partition=gpu --gres=gpu:1 --time=4:00:00"
    slurm.submit(sweep, with_seeds(VARIANTS, 2), arguments, at_once=3)
    script = sweep / "slurm" / "array-1.sh"
    assert caplog.messages == [f"submitted 4 runs as job 100: {script}"]
    assert (cluster / "sbatch").read_text() == f"--parsable {script}\n"
    text = script.read_text()
    for line in ("--array=1-4%3", "--partition=gpu", "--gres=gpu:1", "--time=4:00:00"):
        assert f"#SBATCH {line}\n" in text
    assert text.startswith("#!/bin/bash\n#SBATCH")
    names = script.with_suffix(".txt").read_text().split()
    assert names == ["a-s0", "b-s0", "a-s1", "b-s1"]
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_task_trains_its_line_and_requeues_what_was_saved(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = stub_python(tmp_path / "python", f'printf "%s\\n" "$@" >{cluster}/python; exit 75')
    monkeypatch.setattr(sys, "executable", str(python))
    sweep = tmp_path / "my sweep"
    slurm.submit(sweep, with_seeds(VARIANTS, 2), "", at_once=None)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "100"}
    result = subprocess.run(["bash", str(sweep / "slurm" / "array-1.sh")], env=task)
    assert result.returncode == 75
    arguments = (cluster / "python").read_text().splitlines()
    assert arguments == ["-m", "mobilellm_jax.sweep.child", "run", str(sweep), "a-s1"]
    assert (cluster / "scontrol").read_text() == "requeue 100_3\n"


@pytest.mark.parametrize("code", [0, 1])
def test_what_has_ended_is_not_requeued(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(sys, "executable", str(stub_python(tmp_path / "python", f"exit {code}")))
    slurm.submit(tmp_path, with_seeds(VARIANTS, 1), "", at_once=None)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "100"}
    result = subprocess.run(["bash", str(tmp_path / "slurm" / "array-1.sh")], env=task)
    assert result.returncode == code
    assert not (cluster / "scontrol").exists()


def test_slurms_warning_reaches_the_run(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = tmp_path / "ready"
    # The stand-in takes a moment to save after the signal, like a run.
    body = f"trap 'sleep 0.3; exit 75' TERM; touch {ready}; while :; do sleep 0.05; done"
    monkeypatch.setattr(sys, "executable", str(stub_python(tmp_path / "python", body)))
    slurm.submit(tmp_path, with_seeds(VARIANTS, 1), "", at_once=None)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "100"}
    process = subprocess.Popen(["bash", str(tmp_path / "slurm" / "array-1.sh")], env=task)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert (cluster / "scontrol").read_text() == "requeue 100_1\n"


def test_chosen_rates_wait_for_what_they_are_chosen_from(
    cluster: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runs = with_seeds(VARIANTS, 3, [1e-3, 1e-2])
    slurm.submit(tmp_path, runs, "", at_once=None)
    first, second = (cluster / "sbatch").read_text().splitlines()
    assert "--dependency" not in first and "--dependency=afterany:100 " in second
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "submitted 4 runs as job 100", "submitted 4 runs as job 101"
    ]  # fmt: skip
    names = (tmp_path / "slurm" / "array-2.txt").read_text().split()
    assert names == ["a-s1", "b-s1", "a-s2", "b-s2"]


def test_nothing_is_submitted_twice(cluster: Path, tmp_path: Path) -> None:
    runs = with_seeds(VARIANTS, 1)
    slurm.submit(tmp_path, runs, "", at_once=None)
    (cluster / "queue").write_text("100_[1-2] gpu my_sweep PENDING\n")
    with pytest.raises(ConfigError, match="job 100 of this sweep is still in Slurm's queue"):
        slurm.submit(tmp_path, runs, "", at_once=None)
    (cluster / "queue").write_text("")
    slurm.submit(tmp_path, runs[1:], "", at_once=None)
    assert (tmp_path / "slurm" / "array-2.txt").read_text() == "b-s0\n"
    assert (tmp_path / "slurm" / "array-1.sh").exists(), "what was submitted is kept"


def test_what_slurm_refuses(cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sbatch_args: gpu must be written --name=value"):
        slurm.submit(tmp_path, with_seeds(VARIANTS, 1), "--partition gpu", at_once=None)
    (cluster.parent / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2; exit 1\n")
    with pytest.raises(ConfigError, match="invalid partition"):
        slurm.submit(tmp_path, with_seeds(VARIANTS, 1), "", at_once=None)


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--launcher=slurm needs sbatch"):
        slurm.submit(tmp_path, with_seeds(VARIANTS, 1), "", at_once=None)
