"""The transport of ranks that are threads of one process: messages are handed over, not copied."""

from __future__ import annotations

from flowspec.comm.base import DUE, Clock, Inbox, Message


class InprocTransport:
    """One end of a ring of threads; `ring(world_size)` makes all of them."""

    def __init__(self, rank: int, inboxes: list[Inbox]):
        self.rank, self.world_size = rank, len(inboxes)
        self.inbox, self._inboxes = inboxes[rank], inboxes

    def send_next(self, message: Message) -> None:
        self._inboxes[(self.rank + 1) % self.world_size].put((self.rank, message), due=message.meta.pop(DUE, 0.0))

    def send_control(self, to: int, message: Message) -> None:
        self._inboxes[to].put((self.rank, message), urgent=True, due=message.meta.pop(DUE, 0.0))

    def close(self) -> None:
        """Nothing to stop: there are no threads and no sockets."""


def ring(world_size: int, clock: Clock | None = None) -> list[InprocTransport]:
    inboxes = [Inbox(clock) for _ in range(world_size)]
    return [InprocTransport(rank, inboxes) for rank in range(world_size)]
