"""Runs the runs of a sweep on this machine, several at the same time, each in its own process.

A failed run is recorded, and the other runs continue. On SIGTERM or Ctrl-C, all runs are saved and
the sweep ends. If this process dies, its children notice the closed pipe, save and end
(`child.py`). The children also hold a lock. A sweep that is started in the meantime waits for this
lock.
"""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.processes.run_lock import RunLock
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.file_lock import FileLock, HeldError
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.estimate import Say, child_environment
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import Slot
from mobilellm_jax.train.metrics import read_metrics
from mobilellm_jax.train.stopping import StopRequest

_CHILDREN_LOCK = "children.lock"
_POLL_SEC = 0.2
_SAY_SEC = 30.0


@dataclasses.dataclass
class Child:
    """A process that trains one run."""

    run: Run
    slot: Slot
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def alone(sweep: Path, say: Say) -> Iterator[FileLock]:
    """Makes this process the only one that runs the sweep; yields the lock for its children.

    Raises:
      ConfigError: if another process runs the sweep.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    children = sweep / _CHILDREN_LOCK
    with RunLock(sweep):
        try:
            lock = FileLock(children)
        except HeldError:
            say("waiting for the runs of a sweep that was killed to save and end ...")
            lock = FileLock(children, wait=True)
        with lock:
            yield lock


def run_all(
    sweep: Path,
    runs: Sequence[Run],
    slots: Sequence[Slot],
    expected_sec: Mapping[str, float],
    lock: FileLock,
    say: Say,
) -> bool:
    """Runs the unfinished runs; returns False if a signal stopped the sweep.

    Args:
      sweep: the folder that contains `sweep.json`.
      runs: all requested runs; earlier runs start first.
      slots: shares of the machine. Each slot has one run at a time.
      expected_sec: expected seconds by the name of a run. Only their ratios matter for the estimate
        of the remaining time.
      lock: the lock that `alone` yields.
      say: receives a line per event, and the progress every 30 seconds.
    """
    waiting = [r for r in runs if not _is_finished(sweep, r)]
    free, children = list(slots), list[Child]()
    progress = _Progress(sweep, runs, expected_sec)
    said = time.monotonic()
    try:
        with StopRequest() as stop:
            while (waiting and stop.signal is None) or children:
                while free and stop.signal is None and (ready := _ready(waiting, children)):
                    waiting.remove(ready)
                    children.append(_start(sweep, ready, free.pop(0), lock))
                    say(f"start   {ready.name} on {children[-1].slot.name}")
                if stop.signal is not None:
                    _terminate(children)
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    free.append(child.slot)
                    say(_ended(sweep, child, stopping=stop.signal is not None))
                    say(progress.line([c.run.name for c in children]))
                    said = time.monotonic()
                if children and time.monotonic() - said > _SAY_SEC:
                    say(progress.line([c.run.name for c in children]))
                    said = time.monotonic()
                time.sleep(_POLL_SEC)
            return stop.signal is None
    finally:
        for child in children:  # an exception ended the loop: the children save and end
            child.process.terminate()


def _is_finished(sweep: Path, run: Run) -> bool:
    return files.state_of(sweep, run.name, run.config.train.steps) == "finished"


def _ready(waiting: Sequence[Run], children: Sequence[Child]) -> Run | None:
    """Returns the next run that needs no result of an unfinished run."""
    under_way = {run.name for run in waiting} | {child.run.name for child in children}
    return next((run for run in waiting if under_way.isdisjoint(run.tune_from)), None)


def _start(sweep: Path, run: Run, slot: Slot, lock: FileLock) -> Child:
    log = files.log_file(sweep, run.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    folder = files.run_folder(sweep, run.name)
    if (folder / rundir.OUTCOME).exists():  # the run failed before, or continues to more steps
        files.write_outcome(folder, "again")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mobilellm_jax.sweep.child", "run", str(sweep), run.name),
                *("--with_parent", *slot.arguments),
            ],
            env=child_environment(slot),
            stdin=subprocess.PIPE,  # the pipe stays open while this process lives
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process
            pass_fds=(lock.descriptor,),
        )
    return Child(run, slot, process)


def _terminate(children: Sequence[Child]) -> None:
    for child in children:
        if child.process.poll() is None and child.process.stdin is not None:
            # a closed pipe tells the child to save and end; closing again does nothing
            child.process.stdin.close()


def _ended(sweep: Path, child: Child, stopping: bool) -> str:
    """Returns the message for a child that has ended, and records its failure.

    A child records its own failure, unless it was killed.
    """
    name, code = child.run.name, child.process.returncode
    folder = files.run_folder(sweep, name)
    if code == 0:
        loss = files.last_validation(folder)
        found = "" if loss is None else f", validation loss {loss:.4f}"
        return f"done    {name}{found}"
    if code == SAVED_REQUEUE_ME or (stopping and code == -signal.SIGTERM):
        return f"saved   {name}; the same command again goes on"
    if files.read_outcome(folder).get("state") != "failed":
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        files.write_outcome(folder, "failed", reason=f"its process ended with {how}")
    reason = str(files.read_outcome(folder).get("reason", "")).splitlines()
    log = files.log_file(sweep, name)
    return f"FAILED  {name}: {reason[0] if reason else code}; its output is in {log}"


class _Progress:
    """The progress of the sweep, measured in expected seconds of its runs."""

    def __init__(self, sweep: Path, runs: Sequence[Run], expected_sec: Mapping[str, float]) -> None:
        self._sweep, self._runs, self._expected_sec = sweep, runs, expected_sec
        self._began, self._done_before = time.monotonic(), self._done()

    def line(self, running: Sequence[str]) -> str:
        states = [
            files.state_of(self._sweep, r.name, r.config.train.steps)
            for r in self._runs
            if r.name not in running
        ]
        failed = states.count("failed")
        text = f"        {states.count('finished')} of {len(self._runs)} finished"
        text += f", {failed} failed" if failed else ""
        for name in running:
            records = read_metrics(files.run_folder(self._sweep, name) / rundir.METRICS)
            losses = [r["train/loss"] for r in records if "train/loss" in r]
            step = records[-1]["step"] if records else 0
            loss = f" loss {losses[-1]:.3f}" if losses else ""
            text += f"; {name} step {step}{loss}"
        done = self._done()
        rate = (done - self._done_before) / (time.monotonic() - self._began)
        left = sum(self._expected_sec.values()) - done
        return text + (f"; {in_words(left / rate)} left" if rate > 0 and left > 0 else "")

    def _done(self) -> float:
        done = 0.0
        for run in self._runs:
            folder = files.run_folder(self._sweep, run.name)
            state = files.state_of(self._sweep, run.name, run.config.train.steps)
            share = 1.0
            if state in ("waiting", "started"):
                share = files.last_step(folder) / run.config.train.steps
            done += share * self._expected_sec[run.name]
        return done


def in_words(seconds: float) -> str:
    """Returns a duration in words: "50 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
