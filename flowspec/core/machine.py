"""A stage machine decides what a stage does: events go in, actions come out.

It decides what of a segment is worth computing, what rank 0 is told, when a forward is abandoned,
what is passed on, when cache rows move and which nodes have become text. runtime/worker.py performs
the actions with a model, sim/world.py with time alone, and the tests' worlds with an invented
model. So all three are the same stage.

This module is pure: it knows no tensor, device, clock, thread or transport."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from flowspec.core.cost import Meter
from flowspec.core.messages import Batch, Cost, Idle, Piece, Prune, Segment, Started
from flowspec.core.stage import Accepted, Admitted, Gather, StageState
from flowspec.core.topology import Topology


# ---- events --------------------------------------------------------------------------------------
class Begin(NamedTuple):
    """A request begins; `drop_dead` and `abort` are the switches of its policy."""

    request: int
    drop_dead: bool = True
    abort: bool = True


class Chunk(NamedTuple):
    """So many rows of the prompt were taken off the queue."""

    request: int
    rows: int


class Arrived(NamedTuple):
    """A batch was taken off the queue, in which it lay for `waited` seconds.

    Its hop took `hop` seconds, read from the clocks of two machines."""

    batch: Batch
    waited: float
    hop: float


class Computed(NamedTuple):
    """The forward under way has ended after so many seconds: as a `whole`, or abandoned."""

    seconds: float
    whole: bool = True


class Decided(NamedTuple):
    """Rank 0 has decided what is text, and which nodes live on."""

    request: int
    prune: Prune


class End(NamedTuple):
    """A request has ended or was cancelled."""

    request: int


StageEvent = Begin | Chunk | Arrived | Computed | Decided | End


# ---- actions -------------------------------------------------------------------------------------
class Part(NamedTuple):
    """A part is what one request has in a forward."""

    request: int
    segment: Segment | None
    """It holds the nodes that were worth computing; None means that these are rows of the
    prompt."""
    admitted: Admitted
    """These are their rows in the request's cache."""
    rows: list[int]
    """These are indices of theirs among the rows that arrived."""

    @property
    def context(self) -> int:
        """Return how many rows the cache had before."""
        return self.admitted.length - len(self.rows)


class Compute(NamedTuple):
    """Begin a forward over rows of some requests.

    The performer calls `wanted` between its layers, and `Computed` follows when it is over."""

    parts: list[Part]

    @property
    def rows(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def segments(self) -> list[Segment]:
        """Return the segments of its parts; there are none if the parts are rows of a prompt."""
        return [part.segment for part in self.parts if part.segment]

    @property
    def context(self) -> int:
        """Return how many cache rows lie before a row, as the mean over the rows."""
        return sum(part.context * len(part.rows) for part in self.parts) // max(1, self.rows)


class Passed(NamedTuple):
    """Passed is what goes on to the next rank of one request's part of a forward."""

    request: int
    segment: Segment | None
    """It holds the nodes that are still alive; None means that these are rows of the prompt."""
    rows: list[int]
    """These are indices of theirs among the computed rows."""


class Pass(NamedTuple):
    """Send rows of the forward that has just ended on to the next rank, in one message."""

    parts: list[Passed]

    @property
    def batch(self) -> Batch:
        """Return the batch of its segments; their rows are those of `rows`, in this order."""
        return Batch(tuple(Piece(p.request, p.segment) for p in self.parts if p.segment))

    @property
    def rows(self) -> list[int]:
        return [row for part in self.parts for row in part.rows]


class Tell(NamedTuple):
    """Send this event to rank 0, outside the ring."""

    event: Started | Cost | Idle


class Move(NamedTuple):
    """Move rows of the request's cache; no forward is under way."""

    request: int
    gather: Gather


class Settled(NamedTuple):
    """These nodes became text, at the positions from `at` on.

    What is held of other nodes may be forgotten if they are not alive."""

    request: int
    at: int
    text: list[int]


StageAction = Compute | Pass | Tell | Move | Settled


@dataclass
class _Live:
    """This is what the machine knows of one request."""

    drop_dead: bool
    abort: bool
    books: StageState
    accepted: Accepted = field(default_factory=Accepted)
    due: deque[Gather] = field(default_factory=deque)
    """These moves wait for the end of the forward under way."""


class StageMachine:
    """The machine of the stage of rank `rank`.

    `handle(event)` returns actions, which are to be performed in order. One forward is under way at
    a time."""

    def __init__(self, rank: int, topology: Topology, books: Callable[[], StageState] = StageState):
        self.rank, self._is_first, self._books = rank, topology.is_first(rank), books
        self.meter = Meter()
        self.running: Compute | None = None
        """This is the forward under way, or None."""
        self._live: dict[int, _Live] = {}
        self._over: set[int] = set()  # requests that ended before they began here

    def handle(self, event: StageEvent) -> list[StageAction]:
        return _HANDLERS[type(event)](self, event)

    def forget(self) -> None:
        """Forget what the forwards and hops of earlier requests have cost."""
        self.meter = Meter()

    def books(self, request: int) -> StageState | None:
        """Return the books of a request; None if it is not alive here."""
        live = self._live.get(request)
        return live.books if live else None

    def wanted(self) -> bool:
        """Return whether the forward under way is still worth its time.

        It is not when each of its requests has ended or has only dead nodes in it."""
        assert self.running is not None
        return any(self._wants(part) for part in self.running.parts)

    def _wants(self, part: Part) -> bool:
        live, segment = self._live.get(part.request), part.segment
        return live is not None and (
            segment is None or not (live.abort and live.books.all_dead(segment.ids))
        )

    def walk(self, part: Part, choose: Callable[[int], int]) -> list[int]:
        """Return the indices of a part's nodes that become text, on a last stage that picks tokens.

        The forward under way has been computed. `choose(k)` returns the target's token after the
        k-th node; it is called for these nodes alone."""
        live, segment = self._live.get(part.request), part.segment
        assert segment is not None
        return (
            live.accepted.walk(
                segment.ids, segment.parents, segment.tokens, choose, live.books.root
            )
            if live
            else []
        )

    # ---- what happens ----------------------------------------------------------------------------
    def _begin(self, event: Begin) -> list[StageAction]:
        if event.request in self._over:
            self._over.discard(event.request)
        else:
            self._live[event.request] = _Live(event.drop_dead, event.abort, self._books())
        return []

    def _chunk(self, event: Chunk) -> list[StageAction]:
        live = self._live.get(event.request)
        if live is None:
            return []
        admitted = live.books.extend(event.rows)
        return [self._compute([Part(event.request, None, admitted, admitted.kept)])]

    def _arrived(self, event: Arrived) -> list[StageAction]:
        batch = event.batch
        self.meter.hop(batch.rows, event.hop)
        parts: list[Part] = []
        actions: list[StageAction] = []
        first = 0  # the piece's first row in the batch
        for request, segment in batch.pieces:
            live = self._live.get(request)
            if live:
                if segment.stands_on:
                    actions += self._decided(Decided(request, segment.stands_on))
                admitted = live.books.admit(segment.ids, segment.parents, live.drop_dead)
                rows = [first + k for k in admitted.kept]
                parts += (
                    [Part(request, segment.only(admitted.kept), admitted, rows)] if rows else []
                )
            first += len(segment.ids)
        forward = Compute(parts)
        # rank 0 learns when this stage will be free, so that the next batch can arrive just then
        if self._is_first:
            predicted = self.meter.forward.predict(forward.rows, forward.context)
            expected = predicted if parts else 0.0
            actions.append(Tell(Started(batch.number, forward.rows, expected, event.waited)))
        return [*actions, self._compute(parts)] if parts else actions

    def _compute(self, parts: list[Part]) -> Compute:
        assert self.running is None, "two forwards at a time"
        self.running = Compute(parts)
        return self.running

    def _computed(self, event: Computed) -> list[StageAction]:
        done, self.running = self.running, None
        assert done is not None, "no forward is under way"
        actions: list[StageAction] = []
        self.meter.busy += event.seconds
        if event.whole and self.meter.forward_over(done.rows, event.seconds, done.context):
            actions.append(Tell(self.meter.cost(self.rank, done.context)))
        if not event.whole and self._is_first:
            actions.append(Tell(Idle()))
        passed: list[Passed] = []
        first = 0  # the part's first row in the forward
        for part in done.parts:
            live = self._live.get(part.request)
            if live:
                actions += [Move(part.request, gather) for gather in live.due]
                live.due.clear()
            if live and event.whole:
                passed += self._passed(live, part, first)
            first += len(part.rows)
        return [*actions, Pass(passed)] if passed else actions

    def _passed(self, live: _Live, part: Part, first: int) -> list[Passed]:
        """Return what goes on of a part whose rows begin with row `first` of the forward.

        The list is empty if all of the part is dead."""
        rows, segment = range(first, first + len(part.rows)), part.segment
        if segment is None:
            return [Passed(part.request, None, [*rows])]
        alive = live.books.alive(segment.ids) if live.drop_dead else [*range(len(rows))]
        return (
            [Passed(part.request, segment.only(alive), [rows[k] for k in alive])] if alive else []
        )

    def _decided(self, event: Decided) -> list[StageAction]:
        live = self._live.get(event.request)
        if live is None:
            return []
        at, text = live.books.context, live.books.decided(event.prune)
        gather = live.books.prune(event.prune)
        actions: list[StageAction] = [Settled(event.request, at, text)]
        running = self.running.parts if self.running else []
        if gather and any(part.request == event.request for part in running):
            live.due.append(gather)
        elif gather:
            actions.append(Move(event.request, gather))
        return actions

    def _end(self, event: End) -> list[StageAction]:
        if self._live.pop(event.request, None) is None:
            self._over.add(event.request)
        return []


_HANDLERS: dict[type, Callable] = {
    Begin: StageMachine._begin,
    Chunk: StageMachine._chunk,
    Arrived: StageMachine._arrived,
    Computed: StageMachine._computed,
    Decided: StageMachine._decided,
    End: StageMachine._end,
}
