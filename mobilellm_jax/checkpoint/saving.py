"""Writing checkpoints while training goes on.

A save copies the state from the devices, which holds up the step, and does the rest in a thread:
Orbax writes the arrays, process 0 hashes what lies on the disk, writes the manifest and gives the
folder its name. How a save went is settled among all processes before the next one begins, or at
the end of the run. One that failed is tried again, with the state of that moment; when the last
attempt fails the run fails.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mobilellm_jax import config as config_lib
from mobilellm_jax.checkpoint import folders
from mobilellm_jax.checkpoint.folders import Report, to_stderr
from mobilellm_jax.checkpoint.layout import (
    DATA_STATE_VERSION,
    FORMAT_VERSION,
    IN_PLACE,
    PARAMS,
    TOKENIZER,
    DataState,
    arrays_of,
    checkpoints_folder,
    composite,
    trees_of,
)
from mobilellm_jax.checkpoint.restoring import restore_state
from mobilellm_jax.config import Config
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.run_lock import LockLostError
from mobilellm_jax.storage import rundir, sealing
from mobilellm_jax.train.state import TrainState

RETRY_SEC = (0.0, 60.0, 300.0)  # from a failed save to the next attempt
_SETTLE_SEC = 1800  # that processes wait for one another's part of a save

# What a file system, TensorStore or another process can make of a save.
_FAILURES = (OSError, ValueError, RuntimeError)


class SaveError(RuntimeError):
    """A checkpoint could not be saved, however often that was tried."""


class CheckpointWriter:
    """Saves a run's states without holding up the step, and keeps the newest few.

    All processes call every method in the same step.

    Args:
      run: the run folder.
      config: of the run.
      tokenizer: copied into every checkpoint.
      check_owner: raises if the folder is no longer this run's.
      report: gets a line about whatever goes wrong.
    """

    def __init__(
        self,
        run: epath.PathLike,
        config: Config,
        tokenizer: Tokenizer,
        check_owner: Callable[[], None] = lambda: None,
        report: Report = to_stderr,
    ) -> None:
        self._check_owner = check_owner
        self._run, self._config, self._tokenizer, self._report = run, config, tokenizer, report
        self._folder = checkpoints_folder(run)
        # Across processes the answer must come in the same step for all.
        self._agree = distributed.Agreement() if jax.process_count() > 1 else bool
        self._attempts = self._failures = 0
        self._step: int | None = None  # whose save is not settled yet
        self._written: Future[None] | None = None  # by this process
        self._error: BaseException | None = None  # that this process could not even begin it
        self._retry_at: float | None = None
        self._last: tuple[int, TrainState, DataState] | None = None  # what was given to save
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        if distributed.is_first():
            folders.tidy(self._folder, report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False)  # it still does what it was given
        if kind is None:
            self._settle()
            if self._failures:
                raise SaveError(f"the last save in {self._folder} failed, see above.")
        elif kind is not KeyboardInterrupt and self._written is not None:
            # What is under way may be all that is left of the run. If it fails that has been
            # reported, and the error that ends the run is the one to raise.
            with contextlib.suppress(*_FAILURES):
                self._written.result()

    def save(self, step: int, state: TrainState, data: DataState) -> None:
        """Starts saving `state` as `step`; a step that is already there whole is left as it is.

        Raises:
          SaveError: if the save before it failed, and that was the last attempt.
        """
        self._settle()
        self._step, self._written, self._error = step, None, None
        self._last = (step, state, data)
        self._attempts += 1
        trees = trees_of(state)
        content = {
            "format_version": FORMAT_VERSION,
            "data": {"version": DATA_STATE_VERSION, **dataclasses.asdict(data)},
            "config": dataclasses.asdict(self._config),
            "arrays": arrays_of(trees),
        }
        try:
            if not distributed.from_first(
                f"the place of checkpoint {step}",
                lambda: self._make_room(step),
            ):
                return
            work = folders.work_folder(self._folder, step, self._attempts)
            writer = _start(work, trees, f"{self._attempts}")
        except LockLostError:
            raise
        except _FAILURES as error:
            self._fail(step, error)
            self._error = error
        else:
            self._written = self._pool.submit(self._finish, step, work, writer, content)

    def save_again(self) -> bool:
        """Returns whether a save failed, in any process, and is to be tried again now."""
        due = self._retry_at is not None and time.monotonic() >= self._retry_at
        return self._agree(due)

    def wait(self) -> None:
        """Returns once the last save is on the disk; while the state is there, failed ones repeat.

        Raises:
          SaveError: if the last attempt failed too.
        """
        self._settle()
        while self._failures and self._last is not None and not _is_gone(self._last[1]):
            time.sleep(RETRY_SEC[self._failures - 1])
            self.save(*self._last)
            self._settle()

    def forget_after(self, step: int) -> None:
        """Deletes what was saved after `step`, since the run takes these steps again."""

        def delete() -> None:
            for later in folders.steps(self._run):
                if later > step:
                    folders.delete(self._folder / str(later))

        distributed.from_first("later checkpoints", delete)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state saved as `step`, in the shardings of `abstract`."""
        self._settle()
        self._last = None  # it would keep the arrays of the state before
        return restore_state(self._run, step, abstract)

    def _make_room(self, step: int) -> bool:
        self._check_owner()
        return folders.make_room(self._folder, step, self._report)

    def _finish(
        self,
        step: int,
        work: epath.Path,
        writer: ocp.AsyncCheckpointer,
        content: Mapping[str, Any],
    ) -> None:
        """Waits for the arrays of all processes; the first one then makes a checkpoint of them."""
        try:
            writer.wait_until_finished()
            writer.close()
            if distributed.is_first():
                _complete(self._folder, work, step, self._tokenizer, content)
        except _FAILURES as error:
            self._fail(step, error)
            raise
        if distributed.is_first():
            train = self._config.train
            try:
                folders.delete_old(self._folder, train.keep_checkpoints, train.keep_every)
            except OSError as error:
                self._report(f"old ones in {self._folder} cannot be deleted: {error}")

    def _fail(self, step: int, error: BaseException) -> None:
        """Says so at once; what comes of it is settled later."""
        left = len(RETRY_SEC) - self._failures
        wait = RETRY_SEC[self._failures] if left else 0.0
        then = f"tried again in {wait:.0f} s" if left else "the run ends, this was the last attempt"
        # TensorStore ends its messages with pages of settings.
        why = str(error).split(" [tensorstore_spec")[0]
        self._report(f"step {step} was not saved, {then}: {type(error).__name__}: {why}")
        if distributed.is_first():
            # Half a checkpoint is of no use, and the disk may be full of it.
            with contextlib.suppress(OSError):
                folders.work_folder(self._folder, step, self._attempts).rmtree()
        self._retry_at = time.monotonic() + wait

    def _settle(self) -> None:
        """Waits for the save under way and finds out, together, how it went."""
        step, self._step = self._step, None
        if step is None:
            return
        try:
            with distributed.together(f"saving checkpoint {step}", _SETTLE_SEC):
                if self._error is not None:
                    raise self._error
                if self._written is not None:
                    self._written.result()
        except _FAILURES as error:
            if self._failures == len(RETRY_SEC):
                raise SaveError(
                    f"checkpoint {step} in {self._folder} could not be saved in "
                    f"{self._failures + 1} attempts: {error} Those that are there are as they were."
                ) from error
            if self._retry_at is None:  # it went wrong in another process
                self._retry_at = time.monotonic() + RETRY_SEC[self._failures]
            self._failures += 1
        else:
            self._failures, self._retry_at = 0, None


def save_model(run: epath.PathLike, config: Config, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a run folder around parameters from elsewhere, as its step 0.

    It evaluates, generates and exports like any run, and `train.init_from` starts from it. It has
    no optimizer state, so `train` on the folder itself does not resume it.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    rundir.write_whole(Path(run) / rundir.CONFIG, config_lib.to_json(config))
    copy_tokenizer(tokenizer, Path(run))
    folder, trees = checkpoints_folder(run), {PARAMS: jax.tree.map(np.asarray, params)}
    content = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "arrays": arrays_of(trees),
    }
    if folders.make_room(folder, 0, to_stderr):
        work = folders.work_folder(folder, 0, 1)
        writer = _start(work, trees, "model")
        writer.wait_until_finished()
        writer.close()
        _complete(folder, work, 0, tokenizer, content)


def _start(work: epath.Path, trees: Mapping[str, Any], attempt: str) -> ocp.AsyncCheckpointer:
    """Copies the arrays off the devices and begins to write them."""
    writer = ocp.AsyncCheckpointer(
        composite(trees),
        # The folder is made here and not in a thread, where a disk that refuses it would leave the
        # writers of the arrays waiting for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        # An attempt that failed in one process leaves the others' barrier behind.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=attempt),
        temporary_path_class=IN_PLACE,
    )
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    writer.save(work, args=ocp.args.Composite(**items))
    return writer


def _is_gone(state: TrainState) -> bool:
    """Returns whether the next step has taken the state's memory."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _complete(
    folder: epath.Path,
    work: epath.Path,
    step: int,
    tokenizer: Tokenizer,
    content: Mapping[str, Any],
) -> None:
    place = work / TOKENIZER
    place.mkdir()
    copy_tokenizer(tokenizer, place)
    sealing.seal(work, content)
    folders.commit(folder, work, step)
