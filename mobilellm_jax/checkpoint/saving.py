"""Writes checkpoints while training continues.

A save copies the state from the devices while the next step waits. A thread does the rest: Orbax
writes the arrays. Then process 0 computes the checksums of the files, writes the manifest and gives
the folder its name. All processes compare their results before the next save and at the end of the
run. After a failed save, the next attempt saves the newest state. The run fails if the last attempt
fails. Every `Exception` counts as a failed save, because a library may raise any exception, and no
exception may cost the steps of a run.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
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
from mobilellm_jax.checkpoint.reading import (
    DATA_STATE_VERSION,
    FORMAT_VERSION,
    IN_PLACE,
    PARAMS,
    TOKENIZER,
    DataState,
    arrays_of,
    checkpoints_folder,
    composite,
    restore_state,
    trees_of,
)
from mobilellm_jax.config import Config
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError, no_space
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.processes.run_lock import LockLostError
from mobilellm_jax.storage import rundir, sealing
from mobilellm_jax.train.state import TrainState

RETRY_SEC = (0.0, 60.0, 300.0)  # Waiting times from each failed save to the next attempt.
_SETTLE_SEC = 1800  # Longest wait for another process's part of a save.

_log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """All attempts to save a checkpoint failed."""


class FullDiskError(SaveError, UserError):
    """All attempts to save a checkpoint failed, because the disk is full."""


class CheckpointWriter:
    """Saves the states of a run in the background, and keeps the newest checkpoints.

    All processes call every method in the same step. A method raises a `SaveError` if the last
    attempt has failed. `find_run` returns the run folder, which may have been renamed. It raises an
    error if another run has taken over the folder.
    """

    def __init__(
        self,
        run: epath.PathLike,
        config: Config,
        tokenizer: Tokenizer,
        find_run: Callable[[], epath.PathLike] | None = None,
    ) -> None:
        self._run, self._config, self._tokenizer = run, config, tokenizer
        self._find_run = find_run or (lambda: run)
        self._folder = checkpoints_folder(run)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._in_any_process = Agreement()
        self._numbers = itertools.count(1)  # Numbers of the attempts.
        self._pending: tuple[int, Future[None]] | None = None  # Step and result of a save.
        self._failures = 0  # Number of failed saves since the last success.
        self._retry_at = math.inf  # Value of time.monotonic() at the next attempt.
        self._last: tuple[int, TrainState, DataState] | None = None  # Arguments of the last save.
        if distributed.is_first():
            folders.tidy(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False)  # The thread still finishes its save.
        if kind is None:
            self._settle()
            if self._failures:
                raise SaveError(f"the last save in {self._folder} failed; the log has the error.")
        elif kind is not KeyboardInterrupt and self._pending is not None:
            # This save may hold the last state of the run. If the save fails, the log has its
            # error. The caller receives the error that ended the run.
            with contextlib.suppress(Exception):
                self._pending[1].result()

    def save(self, step: int, state: TrainState, data: DataState) -> None:
        """Starts to save `state` as `step`; does not replace a good checkpoint of this step."""
        self._settle()
        self._retry_at = math.inf
        self._last = (step, state, data)
        number = next(self._numbers)
        work = folders.work_folder(self._folder, step, number)
        saved: Future[None] = Future()
        try:
            self._locate()
            work = folders.work_folder(self._folder, step, number)
            if distributed.from_first(
                f"the place of checkpoint {step}", lambda: folders.make_room(self._folder, step)
            ):
                trees = trees_of(state)
                content = _content(self._config, trees, step)
                content["data"] = {"version": DATA_STATE_VERSION, **dataclasses.asdict(data)}
                writer = _start_writing(work, trees, str(number))
                saved = self._pool.submit(self._finish, step, work, writer, content)
            else:
                saved.set_result(None)
        except LockLostError:
            raise
        except Exception as error:
            self._fail(step, work, error)
            saved.set_exception(error)
        self._pending = step, saved

    def retry_is_due(self) -> bool:
        """Returns whether any process has waited long enough since a failed save to try again."""
        return self._in_any_process(time.monotonic() >= self._retry_at)

    def wait(self) -> None:
        """Waits until the last save is on disk; repeats a failed save if its state is in memory."""
        self._settle()
        while self._failures and self._last is not None and not _is_gone(self._last[1]):
            time.sleep(RETRY_SEC[self._failures - 1])
            self.save(*self._last)
            self._settle()

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`, because the run will repeat these steps."""
        self._locate()

        def delete() -> None:
            for later in folders.steps(self._run):
                if later > step:
                    folders.delete(self._folder / str(later))

        distributed.from_first("later checkpoints", delete)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        self._settle()
        self._last = None  # Frees the arrays of the earlier state.
        self._locate()
        return restore_state(self._run, step, abstract)

    def _locate(self) -> None:
        self._run = distributed.from_first("the run folder", lambda: os.fspath(self._find_run()))
        self._folder = checkpoints_folder(self._run)

    def _finish(
        self, step: int, work: epath.Path, writer: ocp.AsyncCheckpointer, content: Mapping[str, Any]
    ) -> None:
        try:
            _complete(writer, work, content, self._tokenizer)
            if distributed.is_first():
                folders.commit(self._folder, work, step)
        except Exception as error:
            self._fail(step, work, error)
            raise
        if distributed.is_first():
            train = self._config.train
            try:
                folders.delete_old(self._folder, train.keep_checkpoints, train.keep_every)
            except OSError as error:
                _log.warning(f"Old checkpoints in {self._folder} cannot be deleted: {error}")

    def _fail(self, step: int, work: epath.Path, error: BaseException) -> None:
        """Logs a failed save and plans the next attempt; `_settle` counts the failure later."""
        # The log omits the settings that TensorStore appends to a message; they are very long.
        why = f"{type(error).__name__}: {str(error).split(' [tensorstore_spec')[0]}"
        if self._failures < len(RETRY_SEC):
            wait = RETRY_SEC[self._failures]
            self._retry_at = time.monotonic() + wait
            then = f"the next attempt follows in {wait:.0f} s"
        else:
            then = "this was the last attempt, so the run ends"
        _log.warning(f"Step {step} was not saved ({why}); {then}.")
        if distributed.is_first():
            # An incomplete checkpoint has no use, and it may fill the disk.
            with contextlib.suppress(OSError):
                work.rmtree()

    def _settle(self) -> None:
        """Waits for the pending save; counts it as failed if it failed in any process."""
        if self._pending is None:
            return
        (step, saved), self._pending = self._pending, None
        try:
            with distributed.together(f"saving checkpoint {step}", _SETTLE_SEC):
                saved.result()
        except Exception as error:
            if self._failures == len(RETRY_SEC):
                kind = SaveError if no_space(error) is None else FullDiskError
                raise kind(
                    f"checkpoint {step} in {self._folder} could not be saved in "
                    f"{self._failures + 1} attempts: {error} Earlier checkpoints are unchanged. "
                    "Correct the cause, and start the same command again."
                ) from error
            if self._retry_at == math.inf:  # The save failed in another process.
                self._retry_at = time.monotonic() + RETRY_SEC[self._failures]
            self._failures += 1
        else:
            self._failures, self._retry_at = 0, math.inf


def save_model(run: epath.PathLike, config: Config, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a run folder with `params` as its step 0.

    Other commands can open this folder as a run folder. The folder has no optimizer state, so
    training cannot resume there, but a new run can start from it with `train.init_from`.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    write_config(config, tokenizer, Path(run))
    folder, trees = checkpoints_folder(run), {PARAMS: jax.tree.map(np.asarray, params)}
    if folders.make_room(folder, 0):
        work = folders.work_folder(folder, 0, 1)
        content = _content(config, trees, step=0)
        _complete(_start_writing(work, trees, "model"), work, content, tokenizer)
        folders.commit(folder, work, 0)


def write_config(config: Config, tokenizer: Tokenizer, run: Path) -> str:
    """Writes the config and the tokenizer into a run folder; returns the text of the config."""
    text = config_lib.to_json(config)
    rundir.write_whole(run / rundir.CONFIG, text)
    copy_tokenizer(tokenizer, run)
    return text


def _content(config: Config, trees: Mapping[str, Any], step: int) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "arrays": arrays_of(trees),
        "step": step,
    }


def _start_writing(
    work: epath.Path, trees: Mapping[str, Any], attempt: str
) -> ocp.AsyncCheckpointer:
    writer = ocp.AsyncCheckpointer(
        composite(trees),
        # This thread creates the folder. If instead a thread of Orbax failed to create it, the
        # other threads of Orbax would wait for the folder for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        # A failed attempt may leave an open barrier, so each attempt has its own barriers.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=attempt),
        temporary_path_class=IN_PLACE,
    )
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    writer.save(work, args=ocp.args.Composite(**items))
    return writer


def _complete(
    writer: ocp.AsyncCheckpointer,
    work: epath.Path,
    content: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    writer.wait_until_finished()
    writer.close()
    if distributed.is_first():
        place = work / TOKENIZER
        place.mkdir()
        copy_tokenizer(tokenizer, place)
        sealing.seal(work, content)


def _is_gone(state: TrainState) -> bool:
    """Returns whether a later training step has already reused the memory of `state`."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
