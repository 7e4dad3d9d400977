"""Where work is done: in this process, in threads of it, or in actors of a Ray cluster.

All of them are one method, `map(make, items)`: `make` is called once in each place of work (it may load a model), what
it returns is called with each item, and results come back with the item's number, in any order. Work is handed
out as it is done, so a stream of items is never held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Make = Callable[[], Callable[[T], R]]


class Workers(Protocol):
    """Something that does work; see the module's docstring."""

    def map(self, make: Make[T, R], items: Iterable[T]) -> Iterator[tuple[int, R]]: ...


class InProcess:
    """One item after the other, in this process. `make` is called with the first item, not before."""

    def map(self, make: Make[T, R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        work = None
        for number, item in enumerate(items):
            work = work or make()
            yield number, work(item)


class Threads:
    """`count` items at a time, for work that waits for others; what `make` returns is shared by all threads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, make: Make[T, R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        """An exception is raised once the items that are already in hand have been handed out."""
        work, source = make(), enumerate(items)
        with ThreadPoolExecutor(self.count) as pool:
            pending: dict[Future[R], int] = {}
            error: BaseException | None = None
            while True:
                for number, item in islice(source, 0 if error else self.count - len(pending)):
                    pending[pool.submit(work, item)] = number
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    number = pending.pop(future)
                    if future.exception() is None:
                        yield number, future.result()
                    else:
                        error = error or future.exception()
        if error is not None:
            raise error
