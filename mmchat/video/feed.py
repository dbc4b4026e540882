"""An iterator that runs ahead in a thread of its own, so that the next thing is ready when it is asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

_NOTICES = 100  # kept for a reader who does not come
_LEAVE_S = 5.0


class Feed(Generic[T]):
    """The items of a generator that runs in a thread.

    depth: it waits when so many lie ready.  newest: it never waits; an item takes the place of the one that lies
        ready and was not fetched, and passed_over counts.
    weight: what an item counts in passed_over; 0 for one that is never passed over (up to a hundred are kept).

    Iterating raises what the generator raised, after the items before it.
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        *,
        depth: int = 1,
        newest: bool = False,
        weight: Callable[[T], int] = lambda item: 1,
    ) -> None:
        self.passed_over = 0  # before the item that was fetched last
        self._passed = 0
        self._items, self._depth, self._newest, self._weight = items, depth, newest, weight
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._run, name="mmchat-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Feed[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                item = self._ready.popleft()
                self.passed_over = self._passed
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
            if error is not None:
                raise error
            raise StopIteration

    def close(self) -> None:
        """End the generator.  One that is inside a call which does not return in time is left to itself."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                with self._changed:
                    if self._closed:
                        break
                    self._put(item)
                    self._changed.notify_all()
                    if not self._newest:
                        self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            self._items.close()
        except BaseException as raised:  # it belongs to who iterates
            error = raised
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _put(self, item: T) -> None:
        if self._newest:
            kept = [old for old in self._ready if not self._weight(old)]
            if self._weight(item):
                self._passed += sum(map(self._weight, self._ready))
                self._ready = deque(kept)
            elif len(kept) >= _NOTICES:
                return
        self._ready.append(item)
