"""ShapedTransport gives any transport the delays and the bandwidth of another network.

`emulate.link_*` describes that network.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from flowspec.comm.base import DUE, Clock, Message, Transport
from flowspec.core.cost import Emulate
from flowspec.core.messages import FRAME_BYTES


def wire_bytes(message: Message, hidden_scale: float) -> float:
    """Return the bytes of a message that count on an emulated link.

    Rows of features (floating-point, [n, hidden]) count as 2-byte elements times hidden_scale,
    other tensors as they are; a frame is around them."""
    return FRAME_BYTES + sum(
        t.numel() * 2 * hidden_scale if t.is_floating_point() and t.ndim == 2 else t.nbytes
        for t in message.tensors
    )


class _Link:
    """A link is one direction between two ranks.

    It carries one message at a time, and a message is seen link_ms milliseconds after its last
    byte."""

    def __init__(self, emulate: Emulate, clock: Clock):
        self._emulate, self._clock = emulate, clock
        self._free_at = 0.0

    def due(self, message: Message) -> Message:
        """Return the message with the time at which it may be seen."""
        size = wire_bytes(message, self._emulate.hidden_scale)
        self._free_at = max(self._free_at, self._clock.now()) + self._emulate.wire_seconds(size)
        return dataclasses.replace(
            message, meta={**message.meta, DUE: self._free_at + self._emulate.link_ms / 1000}
        )


class Arrivals:
    """Arrivals tell when the messages of one incoming link may be seen.

    That is when the sender says, but no later than the emulated link can have made it."""

    def __init__(self, emulate: Emulate):
        self._emulate = emulate
        self._latest = 0.0

    def due(self, message: Message) -> float:
        """Take the sender's time out of the message and return when the message may be seen.

        The bound follows from `_Link.due`, as the message cannot have left after now."""
        asked = message.meta.pop(DUE, 0.0)
        if not self._emulate.shapes_links or not isinstance(asked, int | float):
            return 0.0
        busy = self._emulate.wire_seconds(wire_bytes(message, self._emulate.hidden_scale))
        self._latest = max(self._latest, time.monotonic() + self._emulate.link_ms / 1000) + busy
        return asked if asked <= self._latest else self._latest


def shaped(transport: Transport, emulate: Emulate) -> Transport:
    """Return the transport with emulated links, or `transport` itself when no link is emulated."""
    return ShapedTransport(transport, emulate) if emulate.shapes_links else transport


class ShapedTransport:
    """A ShapedTransport delays what `inner` sends.

    A message leaves at once and is kept from sight at the other end, so that the real way there
    counts as part of the emulated one. Each link (the ring's and each control line) is shaped by
    itself. All ranks must share a machine's clock."""

    def __init__(self, inner: Transport, emulate: Emulate):
        self._inner = inner
        self.rank, self.topology, self.inbox = inner.rank, inner.topology, inner.inbox
        self.pulses, self.still, self.links = inner.pulses, inner.still, inner.links
        self._next = [_Link(emulate, inner.inbox.clock) for _ in self.topology.next(self.rank)]
        # what a leader and its followers tell each other is part of the emulated forward
        # (Emulate.group_seconds)
        own = self.topology.group(self.rank)
        self._control = {
            to: _Link(emulate, inner.inbox.clock)
            for to in self.topology.control_peers(self.rank)
            if to not in own
        }

    def send_next(self, message: Message, server: int = 0) -> None:
        self._inner.send_next(self._next[server].due(message), server)

    def send_control(self, to: int, message: Message) -> None:
        link = self._control.get(to)
        self._inner.send_control(to, link.due(message) if link else message)

    def abandon(self, ranks: Sequence[int]) -> None:
        self._inner.abandon(ranks)

    def close(self) -> None:
        self._inner.close()
