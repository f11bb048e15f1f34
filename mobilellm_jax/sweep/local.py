"""Trains the runs of a sweep on this machine, each in its own process and several at once.

If a run fails, the sweep records the failure and continues with the other runs. On SIGTERM or
Ctrl-C, all child processes save their runs, and the sweep ends. If this process dies, its children
notice the closed pipe, save their runs and end (`child.py`). The children hold a lock until they
end. A new process for the same sweep waits for this lock.
"""

import contextlib
import dataclasses
import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mobilellm_jax.errors import SAVED_REQUEUE_ME, UserError
from mobilellm_jax.processes.run_lock import RunLock
from mobilellm_jax.run_record import State
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.file_lock import FileLock, HeldError
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.estimate import Pace, in_words, share_done
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import Slot
from mobilellm_jax.train.stopping import StopRequest

_log = logging.getLogger(__name__)
_CHILDREN_LOCK = "children.lock"
_POLL_SEC = 0.2
_SAY_SEC = 30.0


@dataclasses.dataclass
class Child:
    """A process that trains one run."""

    run: Run
    slot: Slot
    process: "subprocess.Popen[bytes]"
    first_share: float = 0.0  # Share of its steps that the run had taken before.
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Closes the pipe, so that the child saves and ends; a second call does nothing."""
        assert self.process.stdin is not None, "`_start` opens the pipe"
        self.process.stdin.close()


@contextlib.contextmanager
def alone(sweep: Path) -> Iterator[FileLock]:
    """Ensures that no other process runs this sweep; yields the lock that its runs share.

    Raises:
      ConfigError: if another process runs the sweep.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    children = sweep / _CHILDREN_LOCK
    with RunLock(sweep):
        try:
            lock = FileLock(children)
        except HeldError:
            _log.info("waiting for the runs of a sweep that was killed to save and end ...")
            lock = FileLock(children, wait=True)
        with lock:
            yield lock


def run_all(
    sweep: Path,
    runs: Sequence[Run],
    slots: Sequence[Slot],
    expected_sec: Mapping[str, float],
    lock: FileLock,
) -> bool:
    """Trains the unfinished runs in their order; returns False if a signal stopped the sweep.

    The function shows a message when a run starts or ends, and the progress every 30 seconds.
    `expected_sec` contains the expected seconds of each run by name. `lock` is the lock that
    `alone` yields.
    """
    states = {run.name: files.state_of(sweep, run) for run in runs}
    waiting = [run for run in runs if states[run.name] not in files.ENDED]
    free, children = list(slots), list[Child]()
    pace, said = Pace(sweep, expected_sec, len(slots)), time.monotonic()

    def say_progress() -> float:
        running = [(child.run, child.seconds, child.first_share) for child in children]
        remaining = ""
        if waiting or children:
            remaining = f"; {in_words(pace.seconds_left(waiting, running))} left"
        under_way = [run for run, _, _ in running]
        _log.info(f"        {_progress(sweep, list(states.values()), under_way)}{remaining}")
        return time.monotonic()

    try:
        with StopRequest() as stop:
            while (waiting and stop.signal is None) or children:
                while free and stop.signal is None and (ready := _ready(waiting, children)):
                    waiting.remove(ready)
                    children.append(_start(sweep, ready, free.pop(0), lock))
                    _log.info(f"start   {ready.name} on {children[-1].slot.name}")
                for child in children if stop.signal is not None else ():
                    child.stop()
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    free.append(child.slot)
                    _log.info(_ended(sweep, child, stopping=stop.signal is not None))
                    states[child.run.name] = _state(sweep, child.run)
                    if states[child.run.name] in files.ENDED:
                        pace.ended(child.run, child.seconds, 1 - child.first_share)
                    said = say_progress()
                if children and time.monotonic() - said > _SAY_SEC:
                    said = say_progress()
                time.sleep(_POLL_SEC)
            return stop.signal is None
    finally:
        for child in children:  # Children remain only after an exception.
            child.stop()


def _state(sweep: Path, run: Run) -> State:
    try:
        return files.state_of(sweep, run)
    except UserError as error:
        _log.warning(f"FAILED  {run.name}: its folder cannot be read: {error}")
        return "failed"


def _ready(waiting: Sequence[Run], children: Sequence[Child]) -> Run | None:
    """Returns the first waiting run that does not depend on an unfinished run."""
    under_way = {run.name for run in [*waiting, *(child.run for child in children)]}
    return next((run for run in waiting if under_way.isdisjoint(run.tune_from)), None)


def _start(sweep: Path, run: Run, slot: Slot, lock: FileLock) -> Child:
    folder = files.run_folder(sweep, run.name)
    first_share = share_done(sweep, run)
    if (folder / rundir.OUTCOME).exists():  # The run failed, or it has more steps now.
        files.write_outcome(folder, "again")
    with files.log_file(sweep, run.name).open("ab") as output:
        process = slot.start(
            *("run", sweep, run.name, "--with_parent"),
            stdin=subprocess.PIPE,  # The pipe stays open while this process lives.
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process.
            pass_fds=(lock.descriptor,),
        )
    return Child(run, slot, process, first_share)


def _ended(sweep: Path, child: Child, stopping: bool) -> str:
    """Returns the message for a child that has ended, and records a killed child as failed."""
    name, code = child.run.name, child.process.returncode
    if code == 0:
        loss = files.last_value(sweep, child.run, "validation/loss")
        found = "" if loss is None else f", validation loss {loss:.4f}"
        return f"done    {name}{found}"
    if code == SAVED_REQUEUE_ME or (stopping and code == -signal.SIGTERM):
        return f"saved   {name}; the same command again goes on"
    folder = files.run_folder(sweep, name)
    if rundir.read_outcome(folder).get("state") != "failed":
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        files.write_outcome(folder, "failed", reason=f"its process ended with {how}")
    reason = str(rundir.read_outcome(folder).get("reason", "")).splitlines()
    log = files.log_file(sweep, name)
    return f"FAILED  {name}: {reason[0] if reason else code}; its output is in {log}"


def _progress(sweep: Path, states: Sequence[State], running: Sequence[Run]) -> str:
    ended = sum(state in files.ENDED for state in states)
    text = f"{ended} of {counted(len(states), 'run')} finished"
    if failed := states.count("failed"):
        text += f", {failed} failed"
    for run in running:
        step, loss = (files.last_value(sweep, run, name) for name in ("step", "train/loss"))
        text += f"; {run.name} step {step or 0}" + (f" loss {loss:.3f}" if loss else "")
    return text
