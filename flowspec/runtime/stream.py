"""A stream hands over what one thread makes to a reader in another, who may wait or be a
coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Ended(Exception):
    """The stream is at its end."""


class Stream(Generic[T]):
    """What is put in comes out in this order; then its end, or an error. It has one reader.

    The writer never waits, however slow the reader is."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._items: deque[T] = deque()
        self._end: BaseException | None = None
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, *items: T) -> None:
        with self._ready:
            self._items.extend(items)
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing comes any more; `error` is raised for the reader behind what came. The first
        counts."""
        with self._ready:
            self._end = self._end or error or Ended()
            self._wake()

    @property
    def ended(self) -> bool:
        """Whether nothing more is put in."""
        return self._end is not None

    def get(self) -> T:
        """Wait for the next item. Ended if there is none, or the error that ended the stream."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._end)
            return self._next()

    async def aget(self) -> T:
        """Do the same as `get` in a coroutine; no thread waits meanwhile."""
        awake = asyncio.Event()
        while True:
            with self._ready:
                if self._items or self._end:
                    self._reader = None
                    return self._next()
                awake.clear()
                self._reader = asyncio.get_running_loop(), awake
            await awake.wait()

    def _next(self) -> T:
        if self._items:
            return self._items.popleft()
        assert self._end is not None
        raise self._end

    def _wake(self) -> None:
        self._ready.notify_all()
        if self._reader is not None:
            loop, awake = self._reader
            if not loop.is_closed():
                loop.call_soon_threadsafe(awake.set)
