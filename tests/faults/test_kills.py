"""Tests that runs which are killed at any moment give the same results as an undisturbed run.

`tests/test_pretrain.py` kills runs after chosen steps. The long test here kills runs at random
moments; `launch/test_soak.sh` runs it.
"""

import collections
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from mobilellm_jax import checkpoint
from mobilellm_jax.config import Config, to_json
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from tests import lives
from tests.faults.records import assert_same_run, log

STEPS = 48
KINDS = ("time", "progress", "saving", "evaluating")
_WAIT_SEC = 600  # the machine may be busy


@pytest.fixture(scope="module")
def config_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a config file of a run with 48 steps, 10 checkpoints and 6 evaluations."""
    return write_config(config, tmp_path_factory.mktemp("kills") / "config.py", STEPS)


def write_config(config: Config, path: Path, steps: int) -> Path:
    train = dataclasses.replace(config.train, steps=steps, checkpoint_every=5)
    evaluate = dataclasses.replace(config.evaluate, every=24)
    whole = dataclasses.replace(config, train=train, evaluate=evaluate)
    path.write_text(
        "from mobilellm_jax.config import from_json, to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(from_json({to_json(whole)!r}))\n"
    )
    return path


@dataclasses.dataclass
class Harness:
    """Starts processes that train in one run folder, and ends them early."""

    config_file: Path
    cache: Path
    random: random.Random
    steps: int = STEPS
    planned: list[tuple[str, signal.Signals]] = dataclasses.field(default_factory=list)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def start(self, workdir: Path, *flags: str) -> ForkServerProcess:
        arguments = ["train", f"--config={self.config_file}", f"--workdir={workdir}", *flags]
        return lives.start(arguments, workdir.with_suffix(".log"), self.cache)

    def uninterrupted(self, workdir: Path) -> float:
        """Trains to the end; returns the time in seconds."""
        began = time.monotonic()
        process = self.start(workdir)
        process.join(_WAIT_SEC)
        assert process.exitcode == 0, said(workdir)
        return time.monotonic() - began

    def kill_once(self, workdir: Path, life_sec: float) -> bool:
        """Starts a process and ends it at a random moment; returns whether it finished before."""
        if not self.planned:  # every kind comes once before a kind comes again
            signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
            self.planned = [(kind, number) for kind in KINDS for number in signals]
            self.random.shuffle(self.planned)
        kind, number = self.planned.pop()
        is_time = self._moment(kind, workdir, life_sec)
        before = len(said(workdir, whole=True))
        process = self.start(workdir)
        deadline = time.monotonic() + _WAIT_SEC
        while process.exitcode is None and not (catches_sigterm(process.pid) and is_time()):
            assert time.monotonic() < deadline, said(workdir)
            time.sleep(0.001)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)
        process.join(_WAIT_SEC)
        self._check(process.exitcode, number, workdir, said(workdir, whole=True)[before:])
        if process.exitcode == 0:
            self.counts["finished first"] += 1
            return True
        self.counts[f"{number.name} {kind}"] += 1
        return False

    def _moment(self, kind: str, workdir: Path, life_sec: float) -> Callable[[], bool]:
        """Returns a function that tells when the moment to kill has come."""
        delay = self.random.choice([0.0, self.random.uniform(0, 0.03)])
        reached: list[float] = []

        def a_moment_after(reaches: Callable[[], bool]) -> Callable[[], bool]:
            def is_time() -> bool:
                if not reached and reaches():
                    reached.append(time.monotonic())
                return bool(reached) and time.monotonic() - reached[0] >= delay

            return is_time

        if kind == "time":
            end = time.monotonic() + self.random.uniform(0, life_sec)
            return lambda: time.monotonic() >= end
        if kind == "saving":
            before = names_in(workdir / "checkpoints")
            return a_moment_after(lambda: bool(names_in(workdir / "checkpoints") - before))
        if kind == "evaluating":
            return a_moment_after(lambda: 0 <= last_loss(workdir) - last_validation(workdir) - 8)
        steps = self.random.randint(1, self.steps // 3)
        first = last_loss(workdir)
        # A start shortens the record, so a process may pass `first` only late.
        return a_moment_after(lambda: last_loss(workdir) >= min(first + steps, self.steps - 1))

    def _check(
        self, code: int | None, number: signal.Signals, workdir: Path, in_this_life: str
    ) -> None:
        ends = SAVED_REQUEUE_ME if number == signal.SIGTERM else -number
        assert code in (0, ends), f"exit code {code}\n{said(workdir)}"
        if code == SAVED_REQUEUE_ME:
            if "SIGTERM: no step is running" in in_this_life:
                self.counts["SIGTERM outside of the steps"] += 1
            else:
                self.counts["saved on SIGTERM"] += 1
                assert checkpoint.latest_step(workdir) == last_loss(workdir), said(workdir)


def catches_sigterm(pid: int | None) -> bool:
    """Returns whether the process has installed a handler of SIGTERM."""
    try:
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def last_loss(workdir: Path) -> int:
    return max((r["step"] for r in _log(workdir) if "train/loss" in r), default=0)


def last_validation(workdir: Path) -> int:
    return max((r["step"] for r in _log(workdir) if "validation/loss" in r), default=-1)


def _log(workdir: Path) -> list[dict[str, int]]:
    return log(workdir) if (workdir / "metrics.jsonl").exists() else []


def said(workdir: Path, *, whole: bool = False) -> str:
    path = workdir.with_suffix(".log")
    return path.read_text()[0 if whole else -4000 :] if path.exists() else ""


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> "Undisturbed":
    """Returns a harness, an undisturbed run, and the time of a run that need not compile."""
    folder = tmp_path_factory.mktemp("undisturbed")
    harness = Harness(config_file, folder / "cache", random.Random(0))
    expected = folder / "expected"
    harness.uninterrupted(expected)  # compiles
    life_sec = harness.uninterrupted(folder / "again")
    assert_same_run(folder / "again", expected, STEPS)
    return harness, expected, life_sec


Undisturbed = tuple[Harness, Path, float]


def kill_and_compare(undisturbed: Undisturbed, folder: Path, kills: int, seed: int) -> str:
    """Kills runs `kills` times in all and lets each run finish; returns the figures."""
    made, expected, life_sec = undisturbed
    harness = Harness(made.config_file, made.cache, random.Random(seed))
    runs = done = 0
    while done < kills:
        workdir, finished = folder / f"run{runs}", False
        while not finished and done < kills:
            finished = harness.kill_once(workdir, life_sec)
            done += not finished
        if not finished:
            harness.uninterrupted(workdir)
        assert_same_run(workdir, expected, STEPS)
        runs += 1
    counts = ", ".join(f"{name} {count}" for name, count in sorted(harness.counts.items()))
    return f"{done} kills of {runs} runs, seed {seed}: all equal to the bit ({counts})"


def test_sigterm_while_a_run_starts_asks_for_another_start(config: Config, tmp_path: Path) -> None:
    harness = Harness(
        write_config(config, tmp_path / "config.py", steps=8),
        Path(os.environ["MOBILELLM_TEST_CACHE"]),
        random.Random(0),
    )
    expected, workdir = tmp_path / "expected", tmp_path / "run"
    harness.uninterrupted(expected)
    for seconds in (0.0, 0.5):
        process = harness.start(workdir)
        while not catches_sigterm(process.pid):
            time.sleep(0.001)
        time.sleep(seconds)
        process.terminate()
        process.join(_WAIT_SEC)
        assert process.exitcode == SAVED_REQUEUE_ME, said(workdir)
        # No unfinished file has its final name, and no lock is left behind.
        left = names_in(workdir) - names_in(expected)
        assert all(name.startswith(".") for name in left), (left, said(workdir))
    assert "SIGTERM: no step is running; stopping." in said(workdir, whole=True)
    harness.uninterrupted(workdir)
    assert_same_run(workdir, expected, 8)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1])
def test_a_hundred_kills(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    said = kill_and_compare(undisturbed, tmp_path, kills=100, seed=seed)
    assert said.startswith("100 kills of "), said
    print(said)
