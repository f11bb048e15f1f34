"""Tests that one of two processes ends with a message when the other is killed or hangs."""

import dataclasses
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from mobilellm_jax import checkpoint
from mobilellm_jax.config import Config
from tests import lives
from tests.faults.records import assert_same_run
from tests.faults.test_kills import SAVED_REQUEUE_ME, Harness, last_loss, write_config
from tests.together import free_port, run_together

STEPS = 24
PEER_TIMEOUT_SEC = 6
HOST = socket.gethostname()
_WAIT_SEC = 600  # the machine may be busy


@pytest.fixture(scope="module")
def config_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a config file of a run with 24 steps, 5 checkpoints and 3 evaluations."""
    return write_config(config, tmp_path_factory.mktemp("peers") / "config.py", STEPS)


@dataclasses.dataclass
class Pair(Harness):
    """Starts both processes of a run, and stops or kills one of them."""

    steps: int = STEPS
    noticed_sec: dict[str, float] = dataclasses.field(default_factory=dict)

    def start_both(self, workdir: Path) -> list[ForkServerProcess]:
        together = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
        together += [f"--peer_timeout={PEER_TIMEOUT_SEC}"]
        run = ["train", f"--config={self.config_file}", f"--workdir={workdir}", *together]
        return [
            lives.start([*run, f"--process_id={own}"], log_of(workdir, own), self.cache)
            for own in (0, 1)
        ]

    def uninterrupted(self, workdir: Path) -> float:
        began = time.monotonic()
        for process in (both := self.start_both(workdir)):
            process.join(_WAIT_SEC)
        assert [process.exitcode for process in both] == [0, 0], all_said(workdir)
        return time.monotonic() - began

    def hurt_once(self, workdir: Path, life_sec: float, victim: int, how: signal.Signals) -> bool:
        """Hurts one process at a random moment; returns whether the run finished before."""
        kind = self.random.choice(["time", "progress", "saving", "evaluating"])
        is_time = self._moment(kind, workdir, life_sec)
        before = [len(said_by(workdir, own)) for own in (0, 1)]
        both = self.start_both(workdir)
        hurt, other = both[victim], both[1 - victim]
        deadline = time.monotonic() + _WAIT_SEC
        while not (watched(said_by(workdir, victim)[before[victim] :]) and is_time()):
            assert time.monotonic() < deadline, all_said(workdir)
            if hurt.exitcode is not None:
                break
            time.sleep(0.001)
        if hurt.exitcode is None and hurt.pid is not None:
            os.kill(hurt.pid, how)
        began = time.monotonic()
        other.join(_WAIT_SEC)
        took = time.monotonic() - began
        if how == signal.SIGSTOP and hurt.exitcode is None and hurt.pid is not None:
            # A process that continues hears that it was given up. The other choice kills it.
            os.kill(hurt.pid, self.random.choice([signal.SIGCONT, signal.SIGKILL]))
        hurt.join(_WAIT_SEC)
        if other.exitcode == 0:
            self.counts["finished first"] += 1
            return hurt.exitcode == 0
        said = said_by(workdir, 1 - victim)[before[1 - victim] :]
        self._check_pair(hurt, other, victim, how, said, workdir)
        self.counts[f"{how.name} {victim} {kind}"] += 1
        self.noticed_sec[how.name] = max(self.noticed_sec.get(how.name, 0.0), took)
        return False

    def _check_pair(
        self,
        hurt: ForkServerProcess,
        other: ForkServerProcess,
        victim: int,
        how: signal.Signals,
        said: str,
        workdir: Path,
    ) -> None:
        codes = {
            signal.SIGKILL: [-signal.SIGKILL],
            signal.SIGTERM: [SAVED_REQUEUE_ME],
            signal.SIGSTOP: [SAVED_REQUEUE_ME, -signal.SIGKILL],
        }[how]
        assert hurt.exitcode in codes, f"hurt: {hurt.exitcode}\n{all_said(workdir)}"
        assert other.exitcode == SAVED_REQUEUE_ME, f"{other.exitcode}\n{all_said(workdir)}"
        who = f"PEERS: process {victim} on host {HOST} (pid {hurt.pid})"
        if how == signal.SIGKILL:
            assert f"{who} is gone: it ended without a message, or was killed." in said, said
        elif how == signal.SIGSTOP:
            assert f"{who} is gone: it sent nothing for {PEER_TIMEOUT_SEC} s" in said, said
        elif "saving, then leaving" in all_said(workdir):
            assert checkpoint.latest_step(workdir) is not None
        assert "resumes from its last complete checkpoint" in said or how == signal.SIGTERM, said


def log_of(workdir: Path, own: int) -> Path:
    return workdir.with_suffix(f".{own}.log")


def said_by(workdir: Path, own: int) -> str:
    path = log_of(workdir, own)
    return path.read_text() if path.exists() else ""


def all_said(workdir: Path) -> str:
    return "\n".join(f"--- {own}\n{said_by(workdir, own)[-4000:]}" for own in (0, 1))


def watched(said: str) -> bool:
    """Returns whether the processes watch each other by now."""
    return "\nstart   process" in said or said.startswith("start   process")


def hurt_and_compare(
    config_file: Path, folder: Path, plan: Iterator[tuple[int, signal.Signals]], seed: int
) -> str:
    """Hurts one process for each entry of the plan; returns the figures when each run is done."""
    pair = Pair(config_file, folder / "cache", random.Random(seed))
    expected = folder / "expected"
    life_sec = pair.uninterrupted(expected)
    runs = done = 0
    planned = next(plan, None)
    while planned:
        workdir, finished = folder / f"run{runs}", False
        while planned and not finished:
            finished = pair.hurt_once(workdir, life_sec, *planned)
            if not finished:
                done, planned = done + 1, next(plan, None)
        if not finished:
            pair.uninterrupted(workdir)
        assert last_loss(workdir) == STEPS
        assert_same_run(workdir, expected, STEPS)
        runs += 1
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(pair.counts.items()))
    longest = ", ".join(f"{name} {sec:.1f} s" for name, sec in sorted(pair.noticed_sec.items()))
    return (
        f"one of two processes hurt {done} times in {runs} runs, seed {seed}: all equal to the bit "
        f"({kinds}); the other one had ended at the latest after {longest} "
        f"(--peer_timeout={PEER_TIMEOUT_SEC})"
    )


FAILS = """
import sys
from mobilellm_jax import pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.train.step import make_train_step

def make(*arguments):
    step_fn = make_train_step(*arguments)

    def step(state, batch):
        state, metrics = step_fn(state, batch)
        if sys.argv[-1] == "--process_id=1" and int(state.step) == 3:
            raise TypeError("a mistake of process 1")
        return state, metrics

    return step

pretrain.make_train_step = make
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_process_that_fails_tells_the_other_the_reason(config_file: Path, tmp_path: Path) -> None:
    flags = [f"--config={config_file}", f"--workdir={tmp_path}/run", "--num_processes=2"]
    flags += [f"--coordinator_address=localhost:{free_port()}", "--peer_timeout=10"]
    commands = [["-c", FAILS, *flags, f"--process_id={own}"] for own in (0, 1)]
    other, failed = run_together(commands, devices=1)
    # Neither process waits for the other, and jax aborts neither.
    assert (other.returncode, failed.returncode) == (1, 1), other.stderr + failed.stderr
    assert "TypeError: a mistake of process 1" in failed.stderr
    assert f"PEERS: process 1 on host {HOST} (pid " in other.stderr
    assert "failed; see its log: TypeError: a mistake of process 1" in other.stderr


WAYS = [(v, how) for how in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM) for v in (0, 1)]


@pytest.mark.slow
def test_a_killed_process_is_named_by_the_other(config: Config, tmp_path: Path) -> None:
    config_file = write_config(config, tmp_path / "config.py", steps=5000)  # it never finishes
    pair = Pair(config_file, Path(os.environ["MOBILELLM_TEST_CACHE"]), random.Random(0))
    workdir = tmp_path / "run"
    killed, other = pair.start_both(workdir)
    deadline = time.monotonic() + _WAIT_SEC
    while checkpoint.latest_step(workdir) is None:
        assert killed.is_alive() and time.monotonic() < deadline, all_said(workdir)
        time.sleep(0.001)
    killed.kill()
    for process in (killed, other):
        process.join(_WAIT_SEC)
    pair._check_pair(killed, other, 0, signal.SIGKILL, said_by(workdir, 1), workdir)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1])
def test_two_processes_many_times(config_file: Path, tmp_path: Path, seed: int) -> None:
    shuffled = random.Random(seed)
    plan = [way for _ in range(5) for way in shuffled.sample(WAYS, len(WAYS))]
    said = hurt_and_compare(config_file, tmp_path, iter(plan), seed=seed)
    assert said.startswith("one of two processes hurt 30 times in "), said
    print(said)
