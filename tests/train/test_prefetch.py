"""Tests the order of batches, the number ahead, errors and the end of the thread."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from mobilellm_jax.train.prefetch import prefetch


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def settled(counter: list[int]) -> int:
    """Returns the count when it has stopped growing."""
    count = -1
    while count != len(counter):
        count = len(counter)
        time.sleep(0.05)
    return count


def test_batches_come_in_order_and_all() -> None:
    assert list(prefetch(iter(range(20)), lambda x: x * x)) == [x * x for x in range(20)]
    assert list(prefetch(iter([]), lambda x: x)) == []
    assert list(prefetch(iter([None, 0]), lambda x: x)) == [None, 0]
    assert threads() == []


def test_no_more_than_two_are_placed_before_they_are_asked_for() -> None:
    placed: list[int] = []
    batches = prefetch(itertools.count(), lambda x: placed.append(x) or x)
    for asked in range(4):
        assert next(batches) == asked
        assert settled(placed) == asked + 1 + 2
    batches.close()
    assert placed == list(range(len(placed)))
    assert threads() == []


def test_the_thread_works_while_the_caller_does() -> None:
    """If a batch were made only on demand, the caller would wait forever."""
    made = threading.Event()

    def put(batch: int) -> int:
        if batch == 1:
            made.set()
        return batch

    batches = prefetch(iter(range(3)), put)
    assert next(batches) == 0
    assert made.wait(timeout=30)
    assert list(batches) == [1, 2]


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    def read() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("disk gone")

    batches = prefetch(read(), lambda x: x)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="disk gone") as error:
        next(batches)
    assert error.traceback[-1].name == "read"
    assert threads() == []


def test_a_caller_that_fails_ends_the_thread() -> None:
    batches = prefetch(itertools.count(), lambda x: x)
    assert next(batches) == 0
    assert len(threads()) == 1
    batches.close()
    assert threads() == []
