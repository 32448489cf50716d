"""Several target servers verify the guesses of one rank 0: speculation parallelism.

This is distributed speculative inference (DSI, arXiv 2405.14105). The drafter never waits. A task
is a segment that goes to a server with nothing to do, and results come back while drafting goes on.
What a server holds of a request is a copy. A server catches up in the same forward: in front of the
nodes of a task go those below which they hang, as far as it has not seen them.

So a node may be computed by several servers, be text before a server returns it, and be sent again
to a server that gave it up. Hence each copy gives nodes names of its own, a fresh one each time
they are sent, and for each server there are prunes of its own: only what has come back from it is
text there, and what follows is below its root. A stage knows nothing of all this.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flowspec.core.decoding import Decoding
from flowspec.core.messages import Batch, Piece, Prune, Segment
from flowspec.core.topology import Topology

BEHIND = 32
"""A server with nothing to do that lacks so many tokens of a text catches up."""
MOST = 64
"""A server that lacks more of the texts than this many tokens is given no task, and catches up even
if it lacks less than BEHIND of each; it does so with at most so many in one forward."""


class _Flight(NamedTuple):
    """A flight is a segment on its way through a server."""

    nodes: dict[int, int]
    """This maps the names of its nodes on the server to the nodes."""
    behind: bool
    """It held nothing but text when it left: the server only catches up."""


class _Copy:
    """A copy is what one server has of one request.

    Its names are those of no other server, but for the first root, which all call 0."""

    def __init__(self, server: int, servers: int) -> None:
        self.names: dict[int, int] = {}
        """This maps each node that has been sent, and may still matter, to its name there."""
        self.back: set[int] = set()
        """All stages of the server hold the rows of these nodes."""
        self.out: dict[int, _Flight] = {}
        """This maps the number of a segment in flight to it."""
        self.have = 0
        """So many nodes of the text are text there, too."""
        self.prune = Prune(0, -1, 0)
        """This was said last: the first root is named 0."""
        self._last, self._step = server, servers  # the newest name, and how far the next one is
        self._promised: int | None = 0  # the name of the next node, which has been told already

    def missing(self, decoding: Decoding) -> int:
        """Return how many nodes of the text are not there and not on their way there."""
        return sum(node not in self.names for node, _ in decoding.text[self.have :])

    def settle(self, decoding: Decoding) -> bool:
        """Take in what is text by now; return whether the server is to be told."""
        text, tree = decoding.text, decoding.tree
        anchor = self.prune.anchor
        while self.have < len(text) and text[self.have][0] in self.back:
            anchor = self.names[text[self.have][0]]
            self.have += 1
        self._give_up(decoding)
        coming = {node for node, _ in text[self.have :]}
        self.names = {n: name for n, name in self.names.items() if n in tree or n in coming}
        self.back &= self.names.keys()
        root = self._root(text[self.have][0] if self.have < len(text) else tree.root.id)
        if (anchor, root) == self.prune[1:]:
            return False
        self.prune = Prune(self.prune.version + 1, anchor, root)
        return True

    def _give_up(self, decoding: Decoding) -> None:
        """Forget what is in flight if nothing of it can become text.

        What became text meanwhile will be sent again: it was not worth a whole forward."""
        flights = self.out.values()
        alive = decoding.tree.nodes.keys()
        if any(f.behind or not alive.isdisjoint(f.nodes.values()) for f in flights):
            return
        for flight in flights:
            for node in flight.nodes.values():
                self.names.pop(node, None)
        self.out = {}

    def _root(self, node: int) -> int:
        """Return the name of the first node that is not text there; it may yet have to be sent."""
        if node in self.names:
            return self.names[node]
        if self._promised is None:
            self._promised = self._new()
        return self._promised

    def _new(self) -> int:
        self._last += self._step
        return self._last

    def send(self, decoding: Decoding, number: int, ids: Sequence[int]) -> Segment:
        """Return the segment of these nodes of the tree with all that they need, which leaves now.

        Without nodes, the server only catches up."""
        self.settle(decoding)
        rows = self._needed(decoding, ids)
        names = [self._named(node) for node, _, _ in rows]
        parents = [self.names.get(parent, self.prune.anchor) for _, parent, _ in rows]
        nodes, _, tokens = zip(*rows, strict=True)
        self.out[number] = _Flight(dict(zip(names, nodes, strict=True)), not ids)
        return Segment(number, tuple(names), tuple(parents), tokens, self.prune)

    def _needed(self, decoding: Decoding, ids: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return (node, parent, token) of all that has to be sent, parents first."""
        text = decoding.text
        behind = [
            (text[k][0], text[k - 1][0] if k else -1, text[k][1])
            for k in range(self.have, len(text))
            if text[k][0] not in self.names
        ]
        if not ids:
            return behind[:MOST]
        nodes, wanted = decoding.tree.nodes, set[int]()
        for id in ids:
            while id in nodes and id not in self.names and id not in wanted:
                wanted.add(id)
                id = nodes[id].parent
        return behind + [(id, nodes[id].parent, nodes[id].token) for id in sorted(wanted)]

    def _named(self, node: int) -> int:
        name, self._promised = self._new() if self._promised is None else self._promised, None
        self.names[node] = name
        return name

    def returned(self, number: int, names: Sequence[int]) -> list[int]:
        """Take in that a segment came back; return the nodes of these names.

        There are none if nobody waits for it."""
        flight = self.out.pop(number, None)
        if flight is None:
            return []
        self.back.update(flight.nodes.values())
        self.back &= self.names.keys()
        return [flight.nodes[name] for name in names]


class Servers:
    """These are the target servers, as rank 0 knows them: what each holds, and what it is doing."""

    def __init__(self, topology: Topology):
        self._copies: list[dict[int, _Copy]] = [{} for _ in range(topology.servers)]
        self.alive = [*range(topology.servers)]
        """These servers are not lost."""

    def admit(self, request: int) -> None:
        for server, copies in enumerate(self._copies):
            copies[request] = _Copy(server, len(self._copies))

    def end(self, request: int) -> None:
        for copies in self._copies:
            copies.pop(request, None)

    def free(self, flights: int) -> list[int]:
        """Return the servers that have fewer than so many segments in flight."""
        busy = [{n for copy in copies.values() for n in copy.out} for copies in self._copies]
        return [k for k in self.alive if len(busy[k]) < flights]

    def stranded(self, server: int, decoding: Decoding) -> tuple[list[int], list[int]]:
        """Return the numbers of a request's segments that were in flight on a lost server.

        Return also those of its nodes there that are on no other server and have come back from
        none."""
        copy, elsewhere = self._copies[server][decoding.request.id], set[int]()
        for k, copies in enumerate(self._copies):
            other = copies[decoding.request.id]
            elsewhere |= other.names.keys() if k in self.alive else other.back
        sent = {node for flight in copy.out.values() for node in flight.nodes.values()}
        numbers, copy.out = [*copy.out], {}
        return numbers, sorted(sent - elsewhere)

    def missing(self, server: int, decodings: Iterable[Decoding]) -> int:
        """Return how many tokens of their texts a server lacks."""
        copies = self._copies[server]
        return sum(copies[d.request.id].missing(d) for d in decodings)

    def next(self, flights: int, decodings: Sequence[Decoding]) -> int | None:
        """Return the server that is to have the next task; None while there is none.

        It is the one that lacks the least of those with fewer than `flights` segments in flight."""
        lacks = {server: self.missing(server, decodings) for server in self.free(flights)}
        ready = [server for server, rows in lacks.items() if rows <= MOST]
        return min(ready, key=lacks.__getitem__, default=None)

    def send(self, server: int, decoding: Decoding, segment: Segment) -> Segment:
        """Return what a server is sent so that it computes the nodes of a segment."""
        return self._copies[server][decoding.request.id].send(decoding, segment.number, segment.ids)

    def catch_up(self, flights: int, decodings: Sequence[Decoding], number: int) -> Batch | None:
        """Return rows of a text for a server that has nothing to do and lacks many of the rows.

        The text is that of which it lacks most."""
        for server in self.free(flights) if decodings else ():
            copies = self._copies[server]
            lacks = [copies[d.request.id].missing(d) for d in decodings]
            if max(lacks) >= BEHIND or sum(lacks) > MOST:
                decoding = decodings[lacks.index(max(lacks))]
                request = decoding.request.id
                return Batch((Piece(request, copies[request].send(decoding, number, ())),), server)
        return None

    def named(self, server: int, request: int, number: int) -> Mapping[int, int]:
        """Return the nodes of a segment in flight by their names on a server.

        There are none if nobody waits for it."""
        flight = self._copies[server][request].out.get(number)
        return flight.nodes if flight else {}

    def decided(self, decoding: Decoding) -> list[tuple[int, Prune]]:
        """Return what servers are to be told of a request whose text has grown."""
        copies = [(k, self._copies[k][decoding.request.id]) for k in self.alive]
        return [(k, copy.prune) for k, copy in copies if copy.settle(decoding)]

    def returned(self, server: int, request: int, number: int, names: Sequence[int]) -> list[int]:
        """Take in that a segment came back; return the nodes of these names.

        There are none if nobody waits for it."""
        copy = self._copies[server].get(request)
        return copy.returned(number, names) if copy else []
