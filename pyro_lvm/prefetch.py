"""Reading ahead: the next batches are read while a step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["read_ahead"]

Asked = TypeVar("Asked")
Read = TypeVar("Read")

DEPTH = 2
"""Batches that are read ahead: one more than is needed where all take as long as each other."""


def read_ahead(asked: Iterable[Asked], read: Callable[[Asked], Read], depth: int = DEPTH) -> Iterator[Read]:
    """What ``read`` gives for each of ``asked``, in their order, the next ``depth`` read in the background.

    ``asked`` is walked by the caller's thread, so that whatever it draws is drawn where it would be without. Each
    reading is a thread of its own, which ends with it: whoever breaks off leaves none behind.

    Args:
        asked: what to read, such as row numbers.
        read: reads one; it may run beside itself and beside the caller, so it draws from no shared generator.
        depth: how many to read ahead.

    Raises:
        Exception: what ``read`` raised, with its traceback, where its turn comes.

    Example:
        >>> list(read_ahead([1, 2, 3], lambda number: number * 10))
        [10, 20, 30]
    """
    under_way: deque[_Reading[Read]] = deque()
    try:
        for each in asked:
            under_way.append(_Reading(read, each))
            if len(under_way) > depth:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for reading in under_way:
            reading.thread.join()


class _Reading(Generic[Read]):
    def __init__(self, read: Callable[[Asked], Read], asked: Asked) -> None:
        self.found: list[Read] = []
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.found.append(read(asked))
            except BaseException as error:  # it is raised where the batch is asked for
                self.error = error

        self.thread = Thread(target=run, name="pyro_lvm reads ahead", daemon=True)
        self.thread.start()

    def result(self) -> Read:
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.found.pop()
