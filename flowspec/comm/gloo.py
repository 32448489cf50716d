"""GlooTransport is for ranks that are processes.

It uses torch.distributed over gloo, point to point, with CPU tensors. What gloo asks for is in
docs/architecture.md ("What gloo does"): a send waits for the peer's receive, so every incoming link
has a thread with a receive always posted, and every outgoing link has a thread that owns what it
sends. A timed-out receive kills its link, so nothing here ever times out; heartbeat.py finds out
who is alive.
"""

from __future__ import annotations

import datetime
import hmac
import queue
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from flowspec.comm.base import Inbox, Links, Lost, Message, Pulse
from flowspec.comm.codec import HEADER, Limit, Limits, decode, encode, payload_size
from flowspec.comm.group import ProcessLinks
from flowspec.comm.seal import SIZE, mac
from flowspec.comm.shaped import Arrivals
from flowspec.core.cost import Emulate
from flowspec.core.topology import Topology

FOREVER = datetime.timedelta(days=30)
FIRST = 1 << 16
"""The first send of a message has at most so many bytes: its header, and its payload if that fits.

A receive that is posted takes what is shorter, too. A second send would have to wait until its
receive is posted, which is three trips over the link instead of one (docs/architecture.md)."""
_BEGIN = 8 * HEADER  # bytes of a header
_BYE = Message("bye")
_BYE_LIMIT = Limit(64, 0)


class _Sender:
    """A sender sends what is put into it to one peer, in order."""

    def __init__(self, to: int, group: dist.ProcessGroup, lost: Lost):
        self.peer, self._group, self._lost = to, group, lost
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"send to {to}", daemon=True)
        self.thread.start()

    def send(self, message: Message) -> None:
        self._queue.put(message)

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            try:
                for part in _parts(message):
                    dist.send(part, self.peer, group=self._group)
            except RuntimeError:
                return self._lost(self.peer, "the connection broke")
            # a message that cannot be encoded is reported; the thread must not just fall silent
            except Exception as error:
                return self._lost(self.peer, f"a {message.kind} message could not be sent: {error}")
            if message is _BYE:
                return


def _parts(message: Message) -> list[torch.Tensor]:
    """Return what is sent of a message: first its header with what fits, then the rest if any."""
    header, payload = encode(message)
    first = torch.cat([header.view(torch.uint8), payload[: FIRST - _BEGIN]])
    rest = payload[FIRST - _BEGIN :]
    return [first, rest] if len(rest) else [first]


class _Receiver:
    """A receiver puts what one peer sends into the inbox, in order.

    The peer is lost once it sends something that cannot be taken in."""

    def __init__(
        self,
        source: int,
        group: dist.ProcessGroup,
        inbox: Inbox,
        urgent: bool,
        limits: Limits,
        arrivals: Arrivals,
        lost: Lost,
    ):
        self.peer, self._group, self._inbox, self._urgent, self._lost = (
            source,
            group,
            inbox,
            urgent,
            lost,
        )
        self._limits, self._arrivals = limits, arrivals
        self.thread = threading.Thread(target=self._run, name=f"receive from {source}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while (message := self._receive()).kind != _BYE.kind:
                self._inbox.put((self.peer, message), self._urgent, self._arrivals.due(message))
        except ConnectionError as error:
            self._lost(self.peer, str(error))
        except ValueError as error:
            self._lost(self.peer, f"its message was refused: {error}")
        except Exception as error:  # a thread that falls silent would hang the run
            self._lost(self.peer, f"its message could not be read: {type(error).__name__}: {error}")

    def _receive(self) -> Message:
        """Return the next message.

        Raise ConnectionError if the link broke and ValueError for what is no message."""
        first = torch.empty(FIRST, dtype=torch.uint8)
        first[:_BEGIN].zero_()  # no header but the peer's own
        self._fill(first)
        header = first[:_BEGIN].view(torch.int64)
        size = payload_size(header, self._limits)
        payload = first[_BEGIN : _BEGIN + size]
        if len(payload) < size:
            payload = torch.empty(size, dtype=torch.uint8)
            payload[: FIRST - _BEGIN] = first[_BEGIN:]
            self._fill(payload[FIRST - _BEGIN :])
        return decode(header, payload, self._limits)

    def _fill(self, part: torch.Tensor) -> None:
        try:
            dist.recv(part, self.peer, group=self._group)
        except RuntimeError:
            raise ConnectionError("the connection broke") from None


def _stage_links(topology: Topology, rank: int, own_gpu: bool, key: bytes) -> Links | None:
    """Return the links of a rank in its stage, after making all groups, as torch wants it.

    They are NCCL's if it is there and every member has a GPU of its own, else gloo's."""
    if topology.members == 1:
        return None
    able = rank == topology.COORDINATOR or (own_gpu and dist.is_nccl_available())
    all_able, own = torch.tensor([int(able)]), None
    dist.all_reduce(all_able, dist.ReduceOp.MIN)
    backend = "nccl" if all_able.item() else "gloo"
    for leader in topology.stage_ranks:
        group = dist.new_group([*topology.group(leader)], backend=backend, timeout=FOREVER)
        if rank in topology.group(leader):
            own = ProcessLinks(group)
            if backend == "gloo":
                prove(group, [*topology.group(leader)], key, "stage")
    return own


class Stranger(Exception):
    """At the other end of a rank's link is somebody who does not know the run's key."""

    def __init__(self, rank: int):
        super().__init__(rank)
        self.rank = rank


def prove(group: dist.ProcessGroup, members: Sequence[int], key: bytes, name: str) -> None:
    """Exchange proofs with every other member of a group, each over its own link.

    gloo takes for a peer who connects first with the right small number. All members call this
    before they send anything else; raise Stranger for a link whose other end has not this key.
    `members` are the ranks of the group, of which this process is one."""

    def proof(sender: int, receiver: int) -> torch.Tensor:
        said = mac(key, *(word.encode() for word in (name, str(sender), str(receiver))))
        return torch.frombuffer(bytearray(said), dtype=torch.uint8)

    me = group.rank()
    others = [k for k in range(group.size()) if k != me]
    theirs = {k: torch.zeros(SIZE, dtype=torch.uint8) for k in others}
    sent = [group.send([proof(me, k)], k, 0) for k in others]
    for work in [*sent, *(group.recv([theirs[k]], k, 0) for k in others)]:
        work.wait()
    for k in others:
        if not hmac.compare_digest(theirs[k].numpy().tobytes(), proof(k, me).numpy().tobytes()):
            raise Stranger(members[k])


class GlooTransport:
    """A GlooTransport is one rank's end of the ring over two process groups of its own.

    torch.distributed must be initialised. `own_gpu` says that this rank computes on a GPU that no
    other rank uses. `limits` say what messages of each kind can hold,
    `emulate` says what links may delay, `pulses` are those that the heartbeat keeps, and with `key`
    every link of gloo's proves itself: raise Stranger if one does not."""

    def __init__(
        self,
        topology: Topology,
        lost: Lost,
        limits: Limits,
        emulate: Emulate,
        pulses: list[Pulse],
        still: float,
        own_gpu: bool = False,
        key: bytes = b"",
    ):
        self.rank, self.topology = dist.get_rank(), topology
        self.pulses, self.still = pulses, still
        self.inbox = Inbox()
        self._closing = False
        self._abandoned: set[int] = set()
        self._lost_peer = lost
        ring, control = (dist.new_group(backend="gloo", timeout=FOREVER) for _ in range(2))
        everybody = dist.group.WORLD
        assert everybody is not None
        for name, group in (("all", everybody), ("ring", ring), ("control", control)):
            prove(group, [*topology.ranks], key, name)
        self.links = _stage_links(topology, self.rank, own_gpu, key)
        peers = topology.control_peers(self.rank)
        limits = {**limits, _BYE.kind: _BYE_LIMIT}
        links = [(peer, control, True) for peer in peers]
        if topology.leads(self.rank):
            links += [(peer, ring, False) for peer in topology.previous(self.rank)]
        self._receivers = [
            _Receiver(peer, group, self.inbox, urgent, limits, Arrivals(emulate), self._lost)
            for peer, group, urgent in links
        ]
        self._next: list[_Sender] = []
        if topology.leads(self.rank):
            self._next = [_Sender(peer, ring, self._lost) for peer in topology.next(self.rank)]
        self._control = {p: _Sender(p, control, self._lost) for p in peers}

    def send_next(self, message: Message, server: int = 0) -> None:
        self._send(self._next[server], message)

    def send_control(self, to: int, message: Message) -> None:
        self._send(self._control[to], message)

    def _send(self, link: _Sender, message: Message) -> None:
        if link.peer not in self._abandoned:
            link.send(message)

    def abandon(self, ranks: Sequence[int]) -> None:
        self._abandoned.update(ranks)

    def close(self) -> None:
        """Say goodbye on every link, and wait until all peers have done so or have died.

        One that hangs does neither: the heartbeat, which beats until this is over, names it."""
        if self._closing:
            return
        self._closing = True
        senders = [*self._next, *self._control.values()]
        for sender in senders:
            self._send(sender, _BYE)
        ends: list[_Sender | _Receiver] = [*senders, *self._receivers]
        for end in ends:
            if end.peer not in self._abandoned:
                end.thread.join()

    def _lost(self, rank: int, reason: str) -> None:
        if not self._closing:
            self._lost_peer(rank, reason)
