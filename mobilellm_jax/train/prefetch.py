"""Batches that are on the devices before the step asks for them."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Read = TypeVar("Read")
Placed = TypeVar("Placed")

AHEAD = 2
"""Batches that wait on the devices. One would do if every batch took equally long to read."""


def prefetch(
    batches: Iterator[Read], put: Callable[[Read], Placed], ahead: int = AHEAD
) -> Generator[Placed, None, None]:
    """Yields `put(batch)` for every batch, in order, made by a thread while the caller computes.

    No more than `ahead` are made before they are asked for. An error in reading or placing a batch
    is raised when that batch is asked for. Close the generator to end the thread.
    """

    def place_next() -> tuple[Placed] | None:
        for batch in batches:
            return (put(batch),)
        return None

    # One thread: batches are read and placed in order.
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        waiting: deque[Future[tuple[Placed] | None]] = deque()
        waiting.extend(pool.submit(place_next) for _ in range(ahead))
        while (placed := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(place_next))
            yield placed[0]
    finally:
        pool.shutdown(cancel_futures=True)
