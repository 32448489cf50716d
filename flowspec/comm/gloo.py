"""The transport of ranks that are processes: torch.distributed over gloo, point to point, CPU tensors.

What gloo asks for (docs/architecture.md, "What gloo does"): a send waits for the peer's receive, so every incoming
link has a thread with a receive always posted, and every outgoing link a thread that owns what it sends. A timed-out
receive kills its link, so nothing here ever times out: liveness is heartbeat.py's business.
"""

from __future__ import annotations

import datetime
import queue
import threading

import torch
import torch.distributed as dist

from flowspec.comm.base import DUE, Inbox, Lost, Message
from flowspec.comm.codec import HEADER, decode, encode, payload_size

FOREVER = datetime.timedelta(days=30)
_BYE = Message("bye")


class _Sender:
    """Sends what is put into it to one peer, in order."""

    def __init__(self, to: int, group: dist.ProcessGroup, lost: Lost):
        self.to, self._group, self._lost = to, group, lost
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"send to {to}", daemon=True)
        self.thread.start()

    def send(self, message: Message) -> None:
        self._queue.put(message)

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            try:
                for part in encode(message):
                    dist.send(part, self.to, group=self._group)
            except RuntimeError:
                return self._lost(self.to, "the connection broke while sending")
            except Exception as error:  # a message that cannot be encoded: say so instead of falling silent
                return self._lost(self.to, f"a {message.kind} message could not be sent: {error}")
            if message is _BYE:
                return


class _Receiver:
    """Puts what one peer sends into the inbox, in order."""

    def __init__(self, source: int, group: dist.ProcessGroup, inbox: Inbox, urgent: bool, lost: Lost):
        self._source, self._group, self._inbox, self._urgent, self._lost = source, group, inbox, urgent, lost
        self.thread = threading.Thread(target=self._run, name=f"receive from {source}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        header = torch.empty(HEADER, dtype=torch.int64)
        while True:
            try:
                dist.recv(header, self._source, group=self._group)
                payload = torch.empty(payload_size(header), dtype=torch.uint8)
                dist.recv(payload, self._source, group=self._group)
                message = decode(header, payload)
            except RuntimeError:
                return self._lost(self._source, "the connection broke")
            except ValueError as error:
                return self._lost(self._source, str(error))
            if message.kind == _BYE.kind:
                return
            self._inbox.put((self._source, message), self._urgent, message.meta.pop(DUE, 0.0))


class GlooTransport:
    """One rank's end of the ring over two process groups of its own. Needs torch.distributed to be initialised."""

    def __init__(self, lost: Lost):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.inbox = Inbox()
        self._closing = False
        self._lost_peer = lost
        ring, control = (dist.new_group(backend="gloo", timeout=FOREVER) for _ in range(2))
        after, before = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        peers = range(1, self.world_size) if self.rank == 0 else [0]
        self._receivers = [_Receiver(before, ring, self.inbox, False, self._lost)]
        self._receivers += [_Receiver(p, control, self.inbox, True, self._lost) for p in peers]
        self._next = _Sender(after, ring, self._lost)
        self._control = {p: _Sender(p, control, self._lost) for p in peers}

    def send_next(self, message: Message) -> None:
        self._next.send(message)

    def send_control(self, to: int, message: Message) -> None:
        self._control[to].send(message)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        senders = [self._next, *self._control.values()]
        for sender in senders:
            sender.send(_BYE)
        for thread in [end.thread for end in senders] + [end.thread for end in self._receivers]:
            thread.join(timeout=2.0)

    def _lost(self, rank: int, reason: str) -> None:
        if not self._closing:
            self._lost_peer(rank, reason)
