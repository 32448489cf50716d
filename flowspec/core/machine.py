"""A stage's mind: events in, actions out. Pure: it knows no tensor, device, clock, thread or transport.

It decides what of a segment is worth computing, what rank 0 is told, when a forward is abandoned, what is passed on, when cache
rows move and which nodes have become text. runtime/worker.py performs that with a model, sim/world.py with time alone, and the
tests' worlds with a model that is made up, so all three are the same stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flowspec.core.cost import Meter
from flowspec.core.messages import Cost, Idle, Prune, Segment, Started
from flowspec.core.stage import Accepted, Admitted, Gather, StageState
from flowspec.core.topology import Topology


# ---- events ----------------------------------------------------------------------------------------
class Begin(NamedTuple):
    """A request begins; `drop_dead` and `abort` are the policy's switches."""

    request: int
    drop_dead: bool = True
    abort: bool = True


class Chunk(NamedTuple):
    """Rows of the prompt were taken off the queue."""

    request: int
    rows: int


class Arrived(NamedTuple):
    """A segment was taken off the queue, in which it lay for `waited` seconds; its hop took `hop` seconds, by two clocks."""

    request: int
    segment: Segment
    waited: float
    hop: float


class Computed(NamedTuple):
    """The forward under way is over after so many seconds: `whole`, or abandoned."""

    seconds: float
    whole: bool = True


class Decided(NamedTuple):
    """Rank 0 has decided what is text, and what lives on."""

    request: int
    prune: Prune


class End(NamedTuple):
    """A request is over, or cancelled."""

    request: int


StageEvent = Begin | Chunk | Arrived | Computed | Decided | End


# ---- actions ---------------------------------------------------------------------------------------
class Compute(NamedTuple):
    """Begin a forward, and say `Computed` when it is over. Ask `wanted` between its layers."""

    request: int
    segment: Segment | None
    """the nodes that were worth it; None: rows of the prompt"""
    admitted: Admitted
    """their rows in the cache, and which of what arrived they are"""

    @property
    def rows(self) -> int:
        return len(self.admitted.kept)

    @property
    def context(self) -> int:
        """Rows of the cache that were there before."""
        return self.admitted.length - self.rows


class Pass(NamedTuple):
    """Send the rows of the forward that has just ended on to the next rank."""

    request: int
    segment: Segment | None
    """the nodes that are still alive; None: rows of the prompt"""
    rows: Sequence[int]
    """which of the computed rows they are"""


class Tell(NamedTuple):
    """Send this to rank 0, beside the ring."""

    request: int
    event: Started | Cost | Idle


class Move(NamedTuple):
    """Move rows of the request's cache. No forward is under way."""

    request: int
    gather: Gather


class Settled(NamedTuple):
    """These nodes became text, at the positions from `at` on. What is held of others may be forgotten if they are not alive."""

    request: int
    at: int
    text: list[int]


StageAction = Compute | Pass | Tell | Move | Settled


@dataclass
class _Live:
    """A request in this stage."""

    drop_dead: bool
    abort: bool
    books: StageState
    accepted: Accepted = field(default_factory=Accepted)
    due: deque[Gather] = field(default_factory=deque)
    """moves that wait for the end of the forward under way"""


class StageMachine:
    """The stage of rank `rank`. `handle(event) -> actions`, to be performed in order. One forward is under way at a time."""

    def __init__(self, rank: int, topology: Topology, books: Callable[[], StageState] = StageState):
        self.rank, self._is_first, self._books = rank, rank == topology.FIRST, books
        self.meter = Meter()
        self.running: Compute | None = None
        """the forward under way"""
        self._live: dict[int, _Live] = {}
        self._over: set[int] = set()  # ended before they began here

    def handle(self, event: StageEvent) -> list[StageAction]:
        return _HANDLERS[type(event)](self, event)

    def forget(self) -> None:
        """Forget what earlier requests have cost."""
        self.meter = Meter()

    def books(self, request: int) -> StageState | None:
        """Of a request that is alive here."""
        live = self._live.get(request)
        return live.books if live else None

    def wanted(self) -> bool:
        """Whether the forward under way is still worth its time: not when its request is over, nor when all of its nodes are dead."""
        assert self.running is not None
        live, segment = self._live.get(self.running.request), self.running.segment
        return live is not None and (
            segment is None or not (live.abort and live.books.all_dead(segment.ids))
        )

    def walk(self, choose: Callable[[int], int]) -> list[int]:
        """On a last stage that picks tokens, with the forward under way computed: indices of its nodes that become text.

        `choose(k)`, the target's token after the k-th, is asked of these alone."""
        assert self.running is not None and self.running.segment is not None
        live, segment = self._live.get(self.running.request), self.running.segment
        return (
            live.accepted.walk(segment.ids, segment.parents, segment.tokens, choose) if live else []
        )

    # ---- what happens ------------------------------------------------------------------------------
    def _begin(self, event: Begin) -> list[StageAction]:
        if event.request in self._over:
            self._over.discard(event.request)
        else:
            self._live[event.request] = _Live(event.drop_dead, event.abort, self._books())
        return []

    def _chunk(self, event: Chunk) -> list[StageAction]:
        live = self._live.get(event.request)
        return (
            []
            if live is None
            else [self._compute(event.request, None, live.books.extend(event.rows))]
        )

    def _arrived(self, event: Arrived) -> list[StageAction]:
        live, segment = self._live.get(event.request), event.segment
        if live is None:
            return []
        self.meter.hop(len(segment.ids), event.hop)
        actions: list[StageAction] = []
        admitted = live.books.admit(segment.ids, segment.parents, live.drop_dead)
        rows, context = len(admitted.kept), admitted.length - len(admitted.kept)
        if self._is_first:  # rank 0 learns when this stage will be free, so that the next segment can arrive just then
            expected = self.meter.forward.predict(rows, context) if rows else 0.0
            actions.append(
                Tell(event.request, Started(segment.number, rows, expected, event.waited))
            )
        if rows:
            actions.append(self._compute(event.request, segment.only(admitted.kept), admitted))
        return actions

    def _compute(self, request: int, segment: Segment | None, admitted: Admitted) -> Compute:
        assert self.running is None, "two forwards at a time"
        self.running = Compute(request, segment, admitted)
        return self.running

    def _computed(self, event: Computed) -> list[StageAction]:
        done, self.running = self.running, None
        assert done is not None, "no forward is under way"
        actions: list[StageAction] = []
        if event.whole and self.meter.forward_over(done.rows, event.seconds, done.context):
            actions.append(Tell(done.request, self.meter.cost(self.rank, done.context)))
        if not event.whole and self._is_first:
            actions.append(Tell(done.request, Idle()))
        live = self._live.get(done.request)
        if live is None:
            return actions
        while live.due:
            actions.append(Move(done.request, live.due.popleft()))
        if event.whole and done.segment is None:
            actions.append(Pass(done.request, None, range(done.rows)))
        elif event.whole and done.segment is not None:
            alive = live.books.alive(done.segment.ids) if live.drop_dead else list(range(done.rows))
            actions += [Pass(done.request, done.segment.only(alive), alive)] if alive else []
        return actions

    def _decided(self, event: Decided) -> list[StageAction]:
        live = self._live.get(event.request)
        if live is None:
            return []
        at, text = live.books.context, live.books.decided(event.prune)
        gather = live.books.prune(event.prune)
        actions: list[StageAction] = [Settled(event.request, at, text)]
        if gather and self.running and self.running.request == event.request:
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
