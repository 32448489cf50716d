"""Rank 0's mind: events in, actions out, for all requests in the ring.

This module is pure: it knows no tensor, device, clock, thread or transport. Each request decides
for itself what is text (core/decoding.py); here is decided what the ring and the drafter do next:
who rides in the next batch, and whose nodes are in the drafter's next forward.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flowspec.core.decoding import Decoding
from flowspec.core.dsi import Servers
from flowspec.core.learnt import Learnt
from flowspec.core.messages import (
    Action,
    Answered,
    Back,
    Batch,
    Cost,
    Decision,
    Draft,
    Event,
    Idle,
    Piece,
    Prune,
    Prunes,
    Read,
    Started,
    Wake,
    Woke,
)
from flowspec.core.policy import DUE
from flowspec.core.ring import Ring
from flowspec.core.topology import Topology
from flowspec.core.tree import Node


class _Offer(NamedTuple):
    """What a request would send in the next batch."""

    decoding: Decoding
    nodes: list[Node]
    """parents before children"""
    reaches: list[float]
    due: int
    """Of the nodes, so many are sent in any case: the first ones."""

    @classmethod
    def of(cls, decoding: Decoding, nodes: list[Node]) -> _Offer:
        reaches = [decoding.policy.reach(node) for node in nodes]
        return cls(decoding, nodes, reaches, reaches.count(DUE))


class Scheduler:
    """`handle(event, now) -> actions`; `now` is any clock in seconds that does not go back."""

    UNEQUAL = 1 / 8
    """Roots beyond a batch's equal share may add this share of a forward to it."""
    GROWTH = (3 / 2, 3 / 4)
    """Batches that take longer than others leave stages idle behind them, so they grow slowly: from
    one round of the ring to the next by at most this share of a forward, or a row a batch. The
    first is for a request alone, which loses a round if it sends too little; in company others
    fill the stages."""

    def __init__(self, topology: Topology, learnt: Learnt | None = None):
        """`learnt` is what the run has found out so far; it goes on learning."""
        self._topology = topology
        self.learnt = learnt or Learnt()
        self.decodings: dict[int, Decoding] = {}
        """This maps the id of each request in the ring to it; who was longest without a turn is
        first."""
        self._servers = Servers(topology) if topology.servers > 1 else None
        self._number = 0  # of the newest batch of this run
        self._drafting: list[Decoding] = []  # those with nodes in the drafter's present forward
        self._draft_begun = 0.0
        self._server = 0  # to which the next batch goes

    @property
    def ring(self) -> Ring:
        return self.learnt.ring

    @property
    def _shared(self) -> bool:
        """Whether several requests are in the ring."""
        return len(self.decodings) > 1

    @property
    def servers(self) -> Sequence[int]:
        """Return the target servers that are not lost."""
        return self._servers.alive if self._servers else (0,)

    def forget(self) -> None:
        """Forget what was learnt: the next request is like the first. None is in the ring."""
        self.learnt = Learnt()

    def admit(self, decoding: Decoding, now: float) -> list[Action]:
        """Begin with a request."""
        if not self.decodings:
            self.ring.begin(decoding.context)
        self.decodings[decoding.request.id] = decoding
        if self._servers:
            self._servers.admit(decoding.request.id)
        self._counted()
        return self._fill(now)

    def cancel(self, request: int, now: float) -> list[Action]:
        """End a request, which need not be there: what it has in flight will be nobody's."""
        self._end(request)
        self._counted()
        return self._fill(now)

    def _end(self, request: int) -> None:
        self.decodings.pop(request, None)
        if self._servers:
            self._servers.end(request)

    def named(self, server: int, request: int, number: int) -> Mapping[int, int]:
        """Return the nodes of a segment in flight by what a server calls them.

        There are none if nobody waits for it."""
        if self._servers:
            return self._servers.named(server, request, number)
        return {id: id for id in self.decodings[request].out.get(number, ())}

    def nodes(self, server: int, request: int, number: int, names: Sequence[int]) -> Sequence[int]:
        """Return the nodes that came back from a server in a segment, by what it calls them.

        There are none if nobody waits for the segment any more."""
        if self._servers is None:
            return names
        return self._servers.returned(server, request, number, names)

    def handle(self, event: Event, now: float) -> list[Action]:
        actions: list[Action] = []
        if isinstance(event, Back):
            actions = self._back(event, now)
        elif isinstance(event, Answered):
            self._answered(event, now)
        elif isinstance(event, Read):
            if event.request in self.decodings:
                self.decodings[event.request].asked = False
        elif isinstance(event, Started):
            self.ring.started(event, now)
        elif isinstance(event, Cost):
            self.ring.measured(event, now)
        elif isinstance(event, Idle):
            self.ring.idle(now)
        else:
            assert isinstance(event, Woke)
        return actions + self._fill(now)

    # ---- what came back --------------------------------------------------------------------------
    def _back(self, event: Back, now: float) -> list[Action]:
        decisions: list[Decision | None] = []
        for segment in event.segments:
            self.ring.returned(segment.number, now)
            if decoding := self.decodings.get(segment.request):
                decisions.append(decoding.returned(segment, now))
        return self._decided(decisions)

    def lost(self, server: int, now: float) -> list[Action]:
        """Go on without a target server: what was in flight there goes to another one."""
        assert self._servers is not None
        self._servers.alive.remove(server)
        decisions = [
            decoding.lost(*self._servers.stranded(server, decoding), now)
            for decoding in self.decodings.values()
        ]
        return self._decided(decisions) + self._fill(now)

    def _decided(self, decisions: Sequence[Decision | None]) -> list[Action]:
        """Return what follows from decisions: the stages are told first."""
        made = [decision for decision in decisions if decision]
        grown = [self.decodings[d.request] for d in made if not d.finish]
        for decision in made:
            if decision.finish:
                self._end(decision.request)
        if made:
            self._counted()
        return [*self._prunes(grown), *made]

    def _prunes(self, grown: list[Decoding]) -> Iterator[Prunes]:
        """Say what was decided of these requests, a message for each server."""
        told: dict[int, list[tuple[int, Prune]]] = defaultdict(list)
        for decoding in grown:
            found = self._servers.decided(decoding) if self._servers else [(0, decoding.prune)]
            for server, prune in found:
                told[server].append((decoding.request.id, prune))
        return (Prunes(server, tuple(prunes)) for server, prunes in told.items())

    def _counted(self) -> None:
        """Tell the ring how many requests there are, and how long their texts are in the mean."""
        self.ring.requests = len(self.decodings)
        if self.decodings:
            contexts = [decoding.context for decoding in self.decodings.values()]
            self.ring.deepened(sum(contexts) // len(contexts))

    # ---- what to do next -------------------------------------------------------------------------
    def _answered(self, event: Answered, now: float) -> None:
        self._drafting = []
        self.ring.drafted(now - self._draft_begun)
        for request, drafted in event.answers:
            if request in self.decodings:
                self.decodings[request].drafted(drafted)

    def _fill(self, now: float) -> list[Action]:
        drafts = self._draft(now)
        sends = self._sends(now)
        # again: a layer that has just left can be drafted from
        return drafts + sends + self._draft(now)

    def _draft(self, now: float) -> list[Action]:
        """Ask for children of the nodes of all requests that want some, in one forward."""
        if self._drafting:
            return []
        asks = [(d, nodes) for d in self.decodings.values() if (nodes := d.draft())]
        if not asks:
            return []
        self._drafting, self._draft_begun = [d for d, _ in asks], now
        lap = self.ring.lap(self._topology)
        return [Draft(tuple((d.request.id, nodes) for d, nodes in asks), lap)]

    def _sends(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while room := self._open():
            ready = self._ready(room, now)
            if not (offers := self._offers(ready)):
                break
            batch = self._batch(offers)
            self.ring.sent(batch.number, now)
            actions.append(batch)
        if self._servers:
            return [*actions, *self._catch_up()]
        if room and len(ready) < len(room) and not math.isinf(self.ring.room_at):
            actions.append(Wake(self.ring.room_at))
        return actions

    def _catch_up(self) -> Iterator[Batch]:
        """Bring servers that have nothing to do, and lack much of a text, up to date."""
        assert self._servers is not None
        decodings, flights = [*self.decodings.values()], self.ring.credits(self._topology)
        while batch := self._servers.catch_up(flights, decodings, self._number + 1):
            self._number += 1
            yield batch

    def _open(self) -> list[Decoding]:
        """Return the requests that may have one more segment in flight.

        If several are in the ring, none may while as many batches are as the ring holds: whoever
        comes back then waits for another, and the two ride together from then on."""
        if self._servers:
            flights, decodings = self.ring.credits(self._topology), [*self.decodings.values()]
            server = self._servers.next(flights, decodings)
            if server is None:
                return []
            self._server = server
        elif self._shared:
            batches = {number for d in self.decodings.values() for number in d.out}
            if len(batches) >= self.ring.credits(self._topology):
                return []
        return [d for d in self.decodings.values() if len(d.out) < d.policy.credits]

    def _ready(self, room: list[Decoding], now: float) -> list[Decoding]:
        """Return those of these requests whose segment would not leave before the first stage can
        take it.

        With several requests none leaves early, since what becomes ready meanwhile rides along."""
        early = now < self.ring.room_at and self._servers is None
        return [d for d in room if not (early and (self._shared or d.policy.just_in_time))]

    def _offers(self, ready: list[Decoding]) -> list[_Offer]:
        """Ask each request in turn what it would send, until what is due fills a batch.

        Who was asked goes to the end of the line. A batch takes no more than its share of the
        roots: the others ride in the next, so that all batches take equally long and none waits
        for a longer one."""
        offers: list[_Offer] = []
        due = roots = 0
        share = self._share() if self._shared else 1
        for decoding in ready:
            if due >= self.ring.MOST:
                break
            if not decoding.tree.root.sent:
                if roots >= share:
                    continue
                roots += 1
            if self._shared:
                self.decodings[decoding.request.id] = self.decodings.pop(decoding.request.id)
            if nodes := decoding.segment():
                offers.append(_Offer.of(decoding, nodes))
                due += offers[-1].due
        return offers

    def _share(self) -> int:
        """Return how many roots a batch may take: an equal share, and what costs hardly more."""
        return self._as_long_as(self._equal, self.UNEQUAL)

    @property
    def _equal(self) -> int:
        """Return the roots of a batch if each of those that the ring holds has as many."""
        return math.ceil(len(self.decodings) / self.ring.credits(self._topology))

    def _as_long_as(self, rows: int, more: float) -> int:
        """Return how many rows take as long as so many, and at most `more` of a forward longer."""
        prices = self.ring.prices
        longest = prices.more[min(rows, self.ring.MOST)] + more * prices.forward
        return int(np.searchsorted(prices.more, longest, side="right")) - 1

    def _most(self) -> int:
        """Return the most rows of a batch that has others before or behind it."""
        credits = self.ring.credits(self._topology)
        if credits == 1:
            return self.ring.MOST
        rows: Counter[int] = Counter()  # of each batch in flight
        for decoding in self.decodings.values():
            rows.update({number: len(ids) for number, ids in decoding.out.items()})
        longest = max([self._equal, *rows.values()])
        growth = self.GROWTH[self._shared] / credits
        return max(longest + 1, self._as_long_as(longest, growth))

    def _batch(self, offers: list[_Offer]) -> Batch:
        """Send what is due, and of the rest the likeliest while they gain more than they cost."""
        self._number += 1
        due = sum(offer.due for offer in offers)
        extra = self._extra(offers, due)
        pieces = [self._piece(o, o.due + n) for o, n in zip(offers, extra, strict=True)]
        return Batch(tuple(piece for piece in pieces if piece), self._server)

    def _extra(self, offers: list[_Offer], due: int) -> list[int]:
        """Return how many nodes of each offer go beside those that are due."""
        if all(len(offer.nodes) == offer.due for offer in offers):
            return [0] * len(offers)
        owners = [k for k, offer in enumerate(offers) for _ in offer.reaches[offer.due :]]
        reaches = np.array([reach for offer in offers for reach in offer.reaches[offer.due :]])
        likeliest = np.argsort(-reaches, kind="stable")[: max(0, self._most() - due)]
        roots = sum(offer.nodes[0] is offer.decoding.tree.root for offer in offers)
        crowd = max(roots, len(self.decodings) / self._topology.stages)
        worth = self.ring.prices.worth(reaches[likeliest], due, crowd) if len(likeliest) else 0
        chosen = np.array([owners[k] for k in likeliest[:worth]], int)
        return np.bincount(chosen, minlength=len(offers)).tolist()

    def _piece(self, offer: _Offer, kept: int) -> Piece | None:
        """Send the first `kept` nodes of an offer and put the others back."""
        decoding, nodes, *_ = offer
        if nodes[kept:]:
            decoding.policy.put_back(nodes[kept:])
        if not kept:
            return None
        segment = decoding.send(self._number, nodes[:kept])
        if self._servers:
            segment = self._servers.send(self._server, decoding, segment)
        return Piece(decoding.request.id, segment)

    def validate(self) -> None:
        """Assert what must hold between events."""
        for decoding in self.decodings.values():
            decoding.validate()
            assert not decoding.finished
