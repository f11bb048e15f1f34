import fcntl
import threading
import time
from pathlib import Path

import pytest

from mobilellm_jax.data.preparation import workers


def test_a_start_waits_for_the_workers_of_the_one_before(tmp_path: Path) -> None:
    lock = tmp_path / "workers.lock"
    workers.wait_for_workers(lock)  # no process holds the lock
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        ended: list[float] = []

        def end() -> None:
            ended.append(time.monotonic())
            held.close()

        timer = threading.Timer(0.2, end)
        timer.start()
        workers.wait_for_workers(lock)
        assert ended and time.monotonic() >= ended[0]
        timer.join()


def test_a_worker_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LEFTOVER_WAIT_SEC", 0.1)
    lock = tmp_path / "workers.lock"
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(RuntimeError, match=r"still holds .*workers\.lock"):
            workers.wait_for_workers(lock)
