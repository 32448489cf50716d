"""What every transport is: a ring for data, a star of control messages beside it, an inbox for what arrives.

Data runs 0 -> 1 -> ... -> S -> 0. Control runs between rank 0 and each stage, and may overtake data or be
overtaken by it. Each link is first in, first out. `send` returns at once and owns the message from then on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A typed frame: a kind, a few JSON-able facts, and tensors of any dtype and shape (empty ones included)."""

    kind: str
    meta: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


class Inbox:
    """A queue with two doors: urgent items (control) leave before the others (data)."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._urgent: deque = deque()
        self._normal: deque = deque()
        self._failure: BaseException | None = None
        self.since = 0.0
        """when the item that `get` gave last had been put (monotonic seconds)"""

    def put(self, item: object, urgent: bool = False) -> None:
        with self._ready:
            (self._urgent if urgent else self._normal).append((time.monotonic(), item))
            self._ready.notify()

    def fail(self, error: BaseException) -> None:
        """Every `get` raises this from now on."""
        with self._ready:
            self._failure = self._failure or error
            self._ready.notify_all()

    def get(self, timeout: float | None = None) -> Any:
        """The next item; None when the time (seconds) is up."""
        with self._ready:
            self._ready.wait_for(lambda: self._urgent or self._normal or self._failure, timeout)
            if self._failure:
                raise self._failure
            for queue in (self._urgent, self._normal):
                if queue:
                    self.since, item = queue.popleft()
                    return item
            return None

    def get_urgent(self, timeout: float = 0.0) -> Any:
        """An urgent item that is here already, or comes before the time (seconds) is up; else None."""
        with self._ready:
            if timeout > 0:
                self._ready.wait_for(lambda: self._urgent or self._failure, timeout)
            return self._urgent.popleft()[1] if self._urgent else None


class Transport(Protocol):
    """One rank's end of the ring. Items of the inbox are (sender's rank, Message)."""

    rank: int
    world_size: int
    inbox: Inbox

    def send_next(self, message: Message) -> None:
        """To the next rank of the ring."""

    def send_control(self, to: int, message: Message) -> None:
        """From rank 0 to a stage or from a stage to rank 0, beside the ring."""

    def close(self) -> None:
        """Say goodbye on every link and stop the threads; idempotent."""


Lost = Callable[[int, str], None]
"""Called with a rank and the reason when a link to it breaks."""
