"""InprocTransport is for ranks that are threads of one process.

Messages are handed over, not copied.
"""

from __future__ import annotations

from flowspec.comm.base import DUE, STILL, Clock, Inbox, Message, Pulse
from flowspec.core.topology import Topology


class InprocTransport:
    """An InprocTransport is one end of a ring of threads; `ring(topology)` makes all ends."""

    still = STILL

    def __init__(self, rank: int, inboxes: list[Inbox], pulses: list[Pulse]):
        self.rank, self.topology, self.pulses = rank, Topology.of_world(len(inboxes)), pulses
        self.inbox, self._inboxes = inboxes[rank], inboxes

    def send_next(self, message: Message) -> None:
        self._inboxes[self.topology.next(self.rank)].put(
            (self.rank, message), due=message.meta.pop(DUE, 0.0)
        )

    def send_control(self, to: int, message: Message) -> None:
        self._inboxes[to].put((self.rank, message), urgent=True, due=message.meta.pop(DUE, 0.0))

    def close(self) -> None:
        """Do nothing: there are no threads and no sockets to stop."""


def ring(topology: Topology, clock: Clock | None = None) -> list[InprocTransport]:
    inboxes, pulses = [Inbox(clock) for _ in topology.ranks], [Pulse() for _ in topology.ranks]
    return [InprocTransport(rank, inboxes, pulses) for rank in topology.ranks]
