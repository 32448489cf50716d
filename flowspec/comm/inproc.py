"""InprocTransport is for ranks that are threads of one process.

Messages are handed over, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowspec.comm.base import DUE, STILL, Clock, Inbox, Links, Message, Pulse
from flowspec.comm.group import thread_links
from flowspec.core.topology import Topology


class InprocTransport:
    """An InprocTransport is one end of a ring of threads; `ring(topology)` makes all ends."""

    still = STILL

    def __init__(
        self,
        rank: int,
        topology: Topology,
        inboxes: list[Inbox],
        pulses: list[Pulse],
        links: Links | None = None,
    ):
        self.rank, self.topology, self.pulses, self.links = rank, topology, pulses, links
        self.inbox, self._inboxes = inboxes[rank], inboxes

    def send_next(self, message: Message, server: int = 0) -> None:
        self._inboxes[self.topology.next(self.rank)[server]].put(
            (self.rank, message), due=message.meta.pop(DUE, 0.0)
        )

    def send_control(self, to: int, message: Message) -> None:
        self._inboxes[to].put((self.rank, message), urgent=True, due=message.meta.pop(DUE, 0.0))

    def abandon(self, ranks: Sequence[int]) -> None:
        """Threads of one process are not lost alone."""

    def close(self) -> None:
        """Let the other members of the stage wait no longer; there is nothing else to stop."""
        if self.links:
            self.links.close()


def ring(topology: Topology, clock: Clock | None = None) -> list[InprocTransport]:
    inboxes, pulses = [Inbox(clock) for _ in topology.ranks], [Pulse() for _ in topology.ranks]
    links: list[Links | None] = [None]  # rank 0's
    for _ in topology.stage_ranks:
        links += thread_links(topology.members)
    links += [None] * topology.drafters
    return [
        InprocTransport(rank, topology, inboxes, pulses, links[rank]) for rank in topology.ranks
    ]
