"""A transport is a ring for data, a star of control messages beside it and an inbox.

Data runs from rank 0 through the stages' leaders and back. Control runs between rank 0 and each
leader and between a leader and its followers (core/topology.py), and may overtake data or be
overtaken by it. Each link is first in, first out. `send_next` and `send_control` return at
once and own the message from then on.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from flowspec.core.topology import Topology


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A message has a kind, a few facts that JSON can hold, and tensors of any dtype and shape.

    Tensors may be empty."""

    kind: str
    meta: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


STILL = 120.0
"""A rank that is at work and has not moved for this many seconds hangs. A layer that comes from a
slow disk takes less."""


class Pulse:
    """A pulse says what a rank's working thread is at.

    That thread moves it; all who watch the thread read it."""

    def __init__(self) -> None:
        self.moves = 0
        self.doing = ""
        """This names the work; it is empty while the thread waits for work, for days if need be."""

    def at(self, doing: str = "") -> None:
        self.doing = doing
        self.moves += 1

    def move(self) -> None:
        """Record that the thread is still at the same work and gets on."""
        self.moves += 1


class Awake:
    """Awake is a clock (seconds) that stands still while this process does.

    Between two looks at it no more than `step` seconds pass."""

    def __init__(self, step: float):
        self._step, self._seconds, self._last = step, 0.0, time.monotonic()

    def __call__(self) -> float:
        before, self._last = self._last, time.monotonic()
        self._seconds += min(self._step, self._last - before)
        return self._seconds


DUE = "due"
"""This fact of a message on an emulated link is the time before which it may not be seen. It is in
monotonic seconds of the machine that all ranks share."""


class Clock:
    """A clock tells the time in seconds and lets it pass; this is the machine's monotonic clock.

    Whatever shares an inbox shares its clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep for so many seconds, and not at all if they are negative."""
        time.sleep(max(0.0, seconds))

    def wait(self, ready: threading.Condition, seconds: float | None) -> None:
        """Wait until `ready`, which the caller holds, is notified or the time (seconds) is up."""
        ready.wait(seconds)


class _Entry(NamedTuple):
    due: float
    number: int
    at: float
    """The item was put at this time."""
    item: Any


class Inbox:
    """An inbox is a queue with two doors: urgent items (control) leave before the others (data).

    Nothing leaves before it is due."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._ready = threading.Condition()
        self._urgent: list[_Entry] = []
        self._normal: list[_Entry] = []
        self._count = 0
        self._failure: BaseException | None = None
        self.since = 0.0
        """The item that `get` gave last arrived, or was due, at this time of the clock."""

    def put(self, item: object, urgent: bool = False, due: float = 0.0) -> None:
        with self._ready:
            self._count += 1
            heapq.heappush(
                self._urgent if urgent else self._normal,
                _Entry(due, self._count, self.clock.now(), item),
            )
            self._ready.notify()

    def fail(self, error: BaseException) -> None:
        """Raise this error in every `get` from now on."""
        with self._ready:
            self._failure = self._failure or error
            self._ready.notify_all()

    def get(self, timeout: float | None = None) -> Any:
        """Return the next item; None when the time (seconds) is up."""
        found = self._first((self._urgent, self._normal), timeout)
        if found:
            self.since = max(found.due, found.at)
        return found and found.item

    def get_urgent(self, timeout: float = 0.0) -> Any:
        """Return an urgent item that is here or comes within the time (seconds); else None."""
        found = self._first((self._urgent,), timeout)
        return found and found.item

    def _first(self, doors: tuple[list[_Entry], ...], timeout: float | None) -> _Entry | None:
        end = math.inf if timeout is None else self.clock.now() + timeout
        with self._ready:
            while True:
                if self._failure:
                    raise self._failure
                now = self.clock.now()
                for queue in doors:
                    if queue and queue[0].due <= now:
                        return heapq.heappop(queue)
                if now >= end:
                    return None
                soonest = min([end, *(queue[0].due for queue in doors if queue)])
                self.clock.wait(self._ready, None if math.isinf(soonest) else soonest - now)


class Links(Protocol):
    """Links are one member's connections with the others of its stage."""

    index: int
    """This member is the index-th; 0 leads."""
    size: int
    """The stage has so many members."""

    def gathered(self, own: Tensor) -> Sequence[Tensor]:
        """Return every member's tensor, in order; all have the shape of `own`."""

    def swapped(self, blocks: Tensor) -> Tensor:
        """Return [size, ...]: what each member had for this one in its `blocks` [size, ...]."""

    def passed(self, out: Tensor, into: Tensor) -> Callable[[], object]:
        """Begin to send `out` to the next member and to fill `into` from the previous one.

        Nothing is sent of an empty tensor. Return what waits until both are done."""

    def close(self) -> None:
        """Let no thread wait for the other members any longer."""


class Transport(Protocol):
    """A transport is one rank's end of the ring.

    Items of the inbox are (sender's rank, Message)."""

    rank: int
    topology: Topology
    inbox: Inbox
    pulses: list[Pulse]
    """There is a pulse by rank: this rank's own, and what is known here of the others'."""
    still: float
    """A rank may be at work without moving for this many seconds."""
    links: Links | None
    """These lead to the other members of a tensor-parallel stage (comm/group.py); None if the rank
    is no member of one."""

    def send_next(self, message: Message, server: int = 0) -> None:
        """Send to the next rank of the ring; from rank 0, of that server's ring."""

    def send_control(self, to: int, message: Message) -> None:
        """Send to one of the topology's control peers, beside the ring."""

    def abandon(self, ranks: Sequence[int]) -> None:
        """Neither send to these ranks nor wait for them any more: they are lost."""

    def close(self) -> None:
        """Say goodbye on every link and stop the threads; idempotent."""


Lost = Callable[[int, str], None]
"""This is called with a rank and the reason when a link to that rank breaks."""
