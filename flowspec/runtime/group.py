"""A group is the ranks that are one stage: its leader, which is a worker, and its followers.

The leader alone talks to the ring, keeps the books and decides. It tells its followers what to
admit, what to compute, which cache rows move and when a request is over, in the order in which it
does so itself, and they do the same with their shards. Nothing is told when a forward is abandoned:
that wish travels with what the members exchange (comm/collectives.py), so all leave off at the same
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowspec.comm.base import Links, Message, Transport
from flowspec.core.stage import Gather
from flowspec.core.topology import Shard
from flowspec.models.parallel import Galaxy, Megatron, Way
from flowspec.models.stage import Cached, Head, Share, StageModel, forward_together
from flowspec.runtime import wire
from flowspec.runtime.memory import peak_memory

SHARING: dict[bool, Way] = {False: Megatron, True: Galaxy}
"""This maps whether a request's rows are spread over the members to how they share the work."""


class Crew:
    """A crew is what a leader sees of its followers; it may be empty."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self._followers = transport.topology.followers(transport.rank)

    def begin(self, request: int, layers: Sequence[int], spread: bool) -> None:
        """Have the followers make room for a request, of which these layers are tapped."""
        self._tell(lambda: wire.follow(request, layers, spread))

    def compute(self, requests: Sequence[int], shares: Sequence[Share], rows: Tensor) -> None:
        """Have the followers put the rows of these requests through their shards."""
        self._tell(lambda: wire.compute(_ordered(requests, shares), rows))

    def move(self, request: int, gather: Gather) -> None:
        self._tell(lambda: wire.move(request, gather))

    def multiply(self, rows: Tensor, two_best: bool) -> None:
        """Have the followers multiply rows [n, hidden] with their shards of lm_head."""
        self._tell(lambda: wire.multiply(rows, two_best))

    def end(self, request: int) -> None:
        self._tell(lambda: wire.leave(request))

    def stop(self) -> None:
        self._tell(lambda: wire.STOP)

    def wait_until_loaded(self) -> list[Message]:
        """Return what the followers tell once they hold their weights."""
        return [self._transport.inbox.get()[1] for _ in self._followers]

    def _tell(self, message: Callable[[], Message]) -> None:
        """Send what `message` makes to every follower; without any, nothing is made."""
        if self._followers:
            told = message()
            for to in self._followers:
                self._transport.send_control(to, told)


def _ordered(requests: Sequence[int], shares: Sequence[Share]) -> list[wire.Ordered]:
    return [
        wire.Ordered(request, share.ids is not None, share.admitted)
        for request, share in zip(requests, shares, strict=True)
    ]


class ShardedHead(Head):
    """A ShardedHead is an lm_head of which each member of the last stage holds a part.

    On a leader, its crew multiplies with it."""

    def __init__(self, part: Head, vocabulary: int, links: Links, crew: Crew):
        self.vocabulary, self.device, self.alone = vocabulary, part.device, False
        self._part, self._links, self._crew = part, links, crew

    def __call__(self, features: Tensor) -> Tensor:
        self._crew.multiply(features, two_best=False)
        return gathered_logits(self._part, self.vocabulary, self._links, features)

    def two_best(self, features: Tensor) -> Tensor:
        """Return the two highest logits of each row in their places, and -inf in all others."""
        self._crew.multiply(features, two_best=True)
        return gathered_two(self._part, self.vocabulary, self._links, features)


def gathered_two(part: Head, vocabulary: int, links: Links, features: Tensor) -> Tensor:
    """Return what `two_best` does, for all members of a stage at once: of each row, every member
    sends two numbers and two tokens instead of its part of the vocabulary."""
    own = part(features)
    first = Shard(links.index, links.size).of(vocabulary).start
    best = torch.from_numpy(own.cpu().numpy().argmax(1))[:, None].to(own.device)  # the lowest token
    rest = own.scatter(1, best, -torch.inf)
    next_best = rest.max(1, keepdim=True).indices
    tokens = torch.cat([best, next_best], 1)
    values = own.gather(1, tokens).double()
    out = own.new_full((len(own), vocabulary), -torch.inf)
    for each in links.gathered(torch.cat([values, (tokens + first).double()], 1)):
        out.scatter_(1, each[:, 2:].long(), each[:, :2].to(out.dtype))
    return out


def gathered_logits(part: Head, vocabulary: int, links: Links, features: Tensor) -> Tensor:
    """Return the logits [n, vocabulary] of rows of features, for all members of a stage at once."""
    sizes = [len(Shard(k, links.size).of(vocabulary)) for k in range(links.size)]
    own = part(features)
    padded = own.new_zeros(len(own), max(sizes))
    padded[:, : own.shape[1]] = own
    parts = links.gathered(padded)
    return torch.cat([each[:, :size] for each, size in zip(parts, sizes, strict=True)], 1)


class Follower:
    """A follower does what its leader tells it, until it is told to stop."""

    def __init__(
        self,
        transport: Transport,
        model: StageModel,
        head: Head | None,
        vocabulary: int,
        first: int,
    ):
        """`first` is the number of the model's first layer in the target; `head` is this member's
        part of lm_head, which has `vocabulary` rows in all."""
        assert transport.links is not None
        self._transport, self._links = transport, transport.links
        self._model, self._head, self._vocabulary, self._first = model, head, vocabulary, first
        self._pulse = transport.pulses[transport.rank]
        self._rows: dict[int, Cached] = {}

    def run(self) -> None:
        while True:
            self._pulse.at()
            _, message = self._transport.inbox.get()
            if message.kind == wire.STOP.kind:
                return
            self._pulse.at(f"at work on a {message.kind} message")
            _TAKEN[message.kind](self, message)

    def _begin(self, message: Message) -> None:
        request, taps = message.meta["request"], message.meta["layers"]
        sharing = SHARING[message.meta["spread"]]
        taps = [layer - self._first for layer in taps]
        self._rows[request] = Cached(self._model, taps=taps, sharing=sharing)

    def _compute(self, message: Message) -> None:
        ordered, rows = wire.read_compute(message)
        shares = [
            Share(self._rows[request], admitted, range(len(admitted.kept)) if tree else None)
            for request, tree, admitted in ordered
        ]
        forward_together(rows, shares, self._moved)
        for share in shares:
            share.cached.settle(0, (), ())  # the leader sends what its drafter reads

    def _moved(self) -> bool:
        self._pulse.move()
        return True

    def _move(self, message: Message) -> None:
        request, gather = wire.read_move(message)
        self._rows[request].cache.gather(gather)

    def _multiply(self, message: Message) -> None:
        assert self._head is not None
        made = gathered_two if message.meta["two_best"] else gathered_logits
        made(self._head, self._vocabulary, self._links, message.tensors[0])

    def _leave(self, message: Message) -> None:
        self._rows.pop(message.meta["request"], None)
        leader = self._transport.topology.leader(self._transport.rank)
        self._transport.send_control(leader, wire.peak(peak_memory()))


_TAKEN: dict[str, Callable[[Follower, Message], None]] = {
    "follow": Follower._begin,
    "compute": Follower._compute,
    "move": Follower._move,
    "multiply": Follower._multiply,
    "leave": Follower._leave,
}
"""This maps the kind of a message to what is done with it."""
