"""A transport with the delays and the bandwidth of another network (`emulate.link_*`), around any transport."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable

from flowspec.comm.base import Message, Transport
from flowspec.core.cost import Emulate


def wire_bytes(message: Message, hidden_scale: float) -> float:
    """Bytes that count: feature rows (floating-point, [n, hidden]) as 2-byte elements times hidden_scale, everything else as it is."""
    return sum(t.numel() * 2 * hidden_scale if t.is_floating_point() and t.ndim == 2 else t.nbytes for t in message.tensors)


class _Link:
    """One direction between two ranks: a message leaves when the link is free and arrives link_ms after its last byte."""

    def __init__(self, emulate: Emulate, deliver: Callable[[Message], None]):
        self._emulate, self._deliver = emulate, deliver
        self._free_at = 0.0
        self._queue: deque[tuple[float, Message] | None] = deque()
        self._ready = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        size = wire_bytes(message, self._emulate.hidden_scale)
        self._free_at = max(self._free_at, time.monotonic()) + self._emulate.wire_seconds(size)
        self._queue.append((self._free_at + self._emulate.link_ms / 1000, message))
        self._ready.release()

    def close(self) -> None:
        self._queue.append(None)
        self._ready.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._ready.acquire()
            entry = self._queue.popleft()
            if entry is None:
                return
            due, message = entry
            time.sleep(max(0.0, due - time.monotonic()))
            self._deliver(message)


def shaped(transport: Transport, emulate: Emulate) -> Transport:
    """`transport` itself when no link is emulated."""
    return ShapedTransport(transport, emulate) if emulate.shapes_links else transport


class ShapedTransport:
    """Delays what `inner` sends. Each link (the ring's and each control line) is shaped by itself."""

    def __init__(self, inner: Transport, emulate: Emulate):
        self._inner = inner
        self.rank, self.world_size, self.inbox = inner.rank, inner.world_size, inner.inbox
        peers = range(1, self.world_size) if self.rank == 0 else [0]
        self._next = _Link(emulate, inner.send_next)
        self._control = {to: _Link(emulate, functools.partial(inner.send_control, to)) for to in peers}

    def send_next(self, message: Message) -> None:
        self._next.send(message)

    def send_control(self, to: int, message: Message) -> None:
        self._control[to].send(message)

    def close(self) -> None:
        for link in (self._next, *self._control.values()):
            link.close()
        self._inner.close()
