"""Encodes pieces in parallel processes and returns the parts in order."""

import collections
import contextlib
import dataclasses
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mobilellm_jax.data.preparation.parts import Job, Part, PieceEncoder, Task
from mobilellm_jax.data.shards import Counts
from mobilellm_jax.errors import UserError
from mobilellm_jax.startup.messages import can_show_a_bar
from mobilellm_jax.storage.file_lock import FileLock, HeldError

WORKERS_LOCK = "workers.lock"  # Every worker process holds this lock while it runs.

_log = logging.getLogger(__name__)

_POLL_SEC = 0.5
_LOG_EVERY_SEC = 30.0
# Number of waiting pieces per worker. More pieces would delay the report of a failure, and with
# fewer pieces workers could run out of work.
_AHEAD = 3
_LEFTOVER_WAIT_SEC = 30.0

_encode: Callable[[Task], Part]  # Encodes in a worker; set by `_start_process`.


def wait_for_workers(lock: Path) -> None:
    """Waits until no worker process of an earlier `prepare` runs, so that none can still write.

    If the parent of a worker process is killed, the worker ends by itself shortly afterwards.

    Raises:
      RuntimeError: if a worker process does not end in time.
    """
    deadline = time.monotonic() + _LEFTOVER_WAIT_SEC
    while True:
        try:
            FileLock(lock).release()
        except HeldError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"A worker process of an earlier prepare still holds {lock} after "
                    f"{_LEFTOVER_WAIT_SEC:.0f} s; end it, then start again."
                ) from error
            time.sleep(0.05)
        else:
            return


def encode_pieces(
    job: Job,
    tasks: Sequence[Task],
    workers: int,
    done_bytes: int,
) -> Generator[Part, None, None]:
    """Encodes `tasks` in `workers` processes, and yields their parts in order.

    Earlier runs encoded `done_bytes` of the sources, and the progress display begins at this
    number. If `workers` is 1, a thread of this process encodes the pieces.

    Raises:
      UserError: if the encoding of a piece raises it (see `PieceEncoder.encode`), or if several
        workers have no memory to share.
      RuntimeError: if a worker process was killed.
    """
    if not tasks:
        return
    total = done_bytes + sum(task.piece.size_bytes for task in tasks)
    # The worker processes are not forked, because a fork would copy locks that other threads of
    # this process hold.
    context = multiprocessing.get_context("spawn")
    counts: Any = [0] * len(dataclasses.fields(Counts))
    pool: Executor
    if workers == 1:
        pool, ahead = ThreadPoolExecutor(1), 1
        encode = _counting(job, counts, contextlib.nullcontext())
    else:
        try:
            counts = context.Array("q", counts)
        except OSError as error:  # Some containers have no /dev/shm, or cannot write to it.
            raise UserError(
                f"--workers={workers} needs shared memory, and this system has none ({error}); "
                "use --workers=1, or mount a writable /dev/shm."
            ) from error
        pool = ProcessPoolExecutor(workers, context, _start_process, (job, counts))
        encode, ahead = _encode_in_process, _AHEAD * workers
    waiting: collections.deque[tuple[Task, Future[Part]]] = collections.deque()
    left = iter(tasks)
    with _Progress(total, done_bytes) as progress:
        try:
            while True:
                while len(waiting) < ahead and (task := next(left, None)) is not None:
                    waiting.append((task, pool.submit(encode, task)))
                if not waiting:
                    return
                task, future = waiting[0]
                if not wait([future], timeout=_POLL_SEC).done:
                    progress.show(counts)
                    continue
                waiting.popleft()
                part = _result(job, task, future)
                progress.update(task.piece.size_bytes)
                progress.show(counts)
                yield part
        finally:
            pool.shutdown(cancel_futures=True)


def _result(job: Job, task: Task, future: "Future[Part]") -> Part:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process was killed, perhaps for lack of memory. The parts that are complete "
            "stay: start the same command again, with fewer --workers if memory was short."
        ) from error
    except (ValueError, OSError):
        # The parent process encodes the piece again. If the error occurs again, its traceback shows
        # where. If a disk or a network failed only once, the second attempt succeeds.
        return PieceEncoder(job).encode(task, lambda _: None)


def _counting(
    job: Job, counts: Any, lock: contextlib.AbstractContextManager[Any]
) -> Callable[[Task], Part]:
    """Returns a function that encodes a piece and, with `lock`, adds its numbers to `counts`."""
    encoder = PieceEncoder(job)

    def count(batch: Counts) -> None:
        with lock:
            for index, added in enumerate(dataclasses.astuple(batch)):
                counts[index] += added

    return lambda task: encoder.encode(task, count)


def _start_process(job: Job, counts: Any) -> None:
    global _encode
    # Ctrl-C interrupts all processes of the group. Workers ignore it, because the parent process
    # ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # This worker process holds the lock until it ends. The next run of `prepare` waits for the lock
    # (`wait_for_workers`).
    FileLock(job.work / WORKERS_LOCK, shared=True, wait=True)
    _encode = _counting(job, counts, counts.get_lock())


def _end_with_parent() -> None:
    """Ends this worker process when its parent ends, because no more work can arrive then."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process runs this"
    parent.join()
    os._exit(1)


def _encode_in_process(task: Task) -> Part:
    return _encode(task)


class _Progress(tqdm):  # type: ignore[type-arg]  # It takes no type argument at run time.
    """Shows encoded bytes, documents/s and tokens/s: as a bar on a terminal, else in the log."""

    def __init__(self, total: int, done: int) -> None:
        self._on_terminal = can_show_a_bar()
        self._next_log_sec = _LOG_EVERY_SEC
        super().__init__(
            desc="encoding",
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            file=sys.stderr if self._on_terminal else io.StringIO(),
        )

    def show(self, counts: Sequence[int]) -> None:
        elapsed = max(self.format_dict["elapsed"], 1e-3)
        documents, tokens, _ = counts
        rates = f"{documents / elapsed:,.0f} documents/s, {tokens / elapsed:,.0f} tokens/s"
        if self._on_terminal:
            self.set_postfix_str(rates)
        elif elapsed >= self._next_log_sec:
            self._next_log_sec = elapsed + _LOG_EVERY_SEC
            total = self.total or 1
            new = self.n - self.initial
            left = f"{(total - self.n) * elapsed / new / 60:,.1f}" if new else "?"
            _log.info(f"Encoded {self.n / total:.1%} of the sources; {rates}; {left} minutes left.")
