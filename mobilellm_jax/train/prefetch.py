"""Places batches on the devices before the step asks for them."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Read = TypeVar("Read")
Placed = TypeVar("Placed")

_AHEAD = 2  # Batches that are placed in advance. Some batches take longer to read, so 1 is too few.


def prefetch(
    batches: Iterator[Read], put: Callable[[Read], Placed]
) -> Generator[Placed, None, None]:
    """Yields `put(batch)` for every batch in order; a thread calls `put` while the caller computes.

    The thread is at most `_AHEAD` batches ahead. If reading or placing a batch fails, the generator
    raises the error when the caller asks for that batch. Close the generator to end the thread.
    """

    def place_next() -> tuple[Placed] | None:
        for batch in batches:
            return (put(batch),)
        return None

    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # One thread keeps the order.
    try:
        waiting: deque[Future[tuple[Placed] | None]] = deque()
        waiting.extend(pool.submit(place_next) for _ in range(_AHEAD))
        while (placed := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(place_next))
            yield placed[0]
    finally:
        pool.shutdown(cancel_futures=True)
