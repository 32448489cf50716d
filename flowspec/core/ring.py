"""The ring is rank 0's picture of what things cost in the ring and of what is on its way there.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

import numpy as np

from flowspec.core.curve import SHAPE, Curve
from flowspec.core.messages import Cost, Started
from flowspec.core.topology import Topology


class Prices(NamedTuple):
    """Prices are the costs of rows in seconds on the slowest stage and link."""

    more: np.ndarray
    """Entry n, of [MOST + 1], is what n rows add to a forward of one row; 0 rows count as 1."""
    forward: float
    """A forward of one row takes this long."""
    least: float
    """A row adds this many seconds on average, at the number of rows where it is cheapest."""

    def token(self, roots: float) -> float:
        """Return the seconds of a token in forwards that carry so many requests' roots.

        What a row has to save is this: with other requests waiting, the alternative to a
        speculative row is not a forward for itself but a root of someone else."""
        rows = min(round(roots), len(self.more) - 1)
        return self.forward if rows <= 1 else (self.forward + float(self.more[rows])) / rows

    def worth(self, reaches: np.ndarray, due: int, roots: float) -> int:
        """Return how many rows to send behind those that are due; one goes if none is due.

        `reaches` are their probabilities to be needed, in falling order. A row that is needed saves
        the time of a token; what it adds to this forward delays everything. So the k first go that
        have the largest sum of reaches * token - seconds."""
        least, most = 0 if due else 1, len(self.more) - 1
        rows = np.minimum(np.arange(due + least, due + len(reaches) + 1), most)
        saved = np.concatenate([[0.0], np.cumsum(reaches) * self.token(roots)])
        return least + int((saved[least:] - self.more[rows]).argmax())


class Ring:
    """A ring holds what rank 0 knows of the costs (in seconds) and of what waits at the first
    stage.

    It outlives requests; `begin` forgets what is in flight."""

    EARLY = 1 / 16
    """A batch is sent to arrive this share of a forward before the first stage is free. Being
    late by the wake-up of a thread costs more than knowing a little less."""
    MOST = 96
    """A batch has at most this many rows, unless a method's own pieces are larger."""
    LATEST = 65
    """The usual hop rests on this many latest ones."""
    NEWS = 8
    """How busy a stage is follows from its latest so many reports."""
    GUESS = Curve.line(0.02, 0.02 / SHAPE)
    """This is the curve of forwards before a stage has reported its own."""

    def __init__(self) -> None:
        self.costs: dict[int, Curve] = {}
        """This maps a stage to the curve of its forwards, once it has reported it."""
        self.rows: dict[int, float] = {}
        """This maps a stage to the seconds that a row adds to the hop to it."""
        self.hop = math.inf
        """The shortest hop takes this long: the first stage's answer without its wait in the queue,
        halved, and the least of these. It is infinity before the first answer."""
        self.hops: deque[float] = deque(maxlen=self.LATEST)
        """These are the latest such halves, which include the wake-ups of a busy machine."""
        self.draft = 0.0
        """A drafter's forward takes this many seconds (smoothed); 0 until there was one."""
        self.news = 0
        """The first stage has reported its cost this many times."""
        self.plain: tuple[float, int] | None = None
        """These are the seconds of a token without speculation and the context (in tokens) behind
        which they were measured; None until it was tried."""
        self.requests = 0
        """So many requests are in the ring."""
        self.begin(0)

    def begin(self, context: int) -> None:
        """Begin anew behind `context` tokens: nobody waits for what is still in flight."""
        # number of a batch -> when it was sent, until the first stage starts on it
        self.waiting: dict[int, float] = {}
        # stage -> the latest (time, seconds of its forwards so far)
        self._busy: dict[int, deque[tuple[float, float]]] = {}
        self._last = 0  # number of the newest batch
        self.free_at = -math.inf  # when the first stage becomes free
        self.context = context
        """The stages' KV caches hold so many committed tokens of a request (the mean of them)."""
        self._times: np.ndarray | None = None
        self._prices: Prices | None = None
        self._forwards: dict[int, float] = {}

    def sent(self, number: int, now: float) -> None:
        """Record that batch `number` has left."""
        self.waiting[number], self._last = now, number

    def started(self, event: Started, now: float) -> None:
        """Take in that the first stage has taken a batch off its queue."""
        sent_at = self.waiting.pop(event.number, None)
        if sent_at is None:  # it came back before this news did
            return
        hop = max(0.0, (now - sent_at - event.waited) / 2)  # whatever a stage says of its wait
        self.hop = min(self.hop, hop)
        self.hops.append(hop)
        # the slowest stage or link sets the pace: what leaves sooner would only wait there
        self.free_at = (
            now
            + (max(event.expected, self._pace(event.rows)) if event.rows else 0.0)
            - self.known_hop
        )

    def measured(self, event: Cost, now: float = 0.0) -> None:
        """Take in what a stage has measured."""
        lately = self._busy.setdefault(event.stage, deque(maxlen=self.NEWS))
        lately.append((now, event.busy))
        self.costs[event.stage] = event.forward
        self.rows[event.stage] = event.row
        self.news += event.stage == 1
        self._times, self._prices, self._forwards = None, None, {}

    def deepened(self, context: int) -> None:
        """Take in that the stages' KV caches hold `context` committed tokens now."""
        if self.context <= context <= 16 + self.context * 33 // 32:  # costs hardly change
            return
        self.context, self._times, self._prices, self._forwards = context, None, None, {}

    @property
    def times(self) -> np.ndarray:
        """Return the seconds of a forward over 0, 1, ... MOST rows on the slowest stage [MOST + 1].

        They hold at the present context; 0 rows count as 1. Until a stage has reported its costs
        they are a guess."""
        if self._times is None:
            rows = np.maximum(np.arange(self.MOST + 1.0), 1)
            self._times = np.max(
                [curve.over(rows, self.context) for curve in self.costs.values() or [self.GUESS]], 0
            )
        return self._times

    @property
    def base(self) -> float:
        """Return the seconds of a forward over one row on the slowest stage."""
        return float(self.times[1])

    @property
    def prices(self) -> Prices:
        """Return the costs of rows at the present context, links included."""
        if self._prices is None:
            rows = np.maximum(np.arange(self.MOST + 1) - 1, 0)
            more = self.times - self.times[1] + self.row * rows
            least = float((more[2:] / rows[2:]).min())
            self._prices = Prices(more, self.base + self.row, least)
        return self._prices

    @property
    def row(self) -> float:
        """Return the seconds that a row adds to a hop, on the slowest link."""
        return max(self.rows.values(), default=0.0)

    def forwards(self, stages: int, context: int) -> float:
        """Return the seconds of a forward over one row on each of `stages` stages, summed.

        Stages that have not reported their costs are taken to be like the others."""
        if context not in self._forwards:
            seconds = [curve.at(1, context) for curve in self.costs.values() or [self.GUESS]]
            self._forwards[context] = sum(seconds) / len(seconds)
        return stages * self._forwards[context]

    def lap(self, topology: Topology) -> float:
        """Return the seconds of a round of the ring with one row alone, links included."""
        return self.forwards(topology.stages, self.context) + topology.hops * self.known_hop

    def busy(self, stage: int) -> float | None:
        """Return the share of the time in which a stage has computed lately; None if not known."""
        lately = self._busy.get(stage)
        if lately is None or lately[-1][0] <= lately[0][0]:
            return None
        (since, before), (now, after) = lately[0], lately[-1]
        return min(1.0, (after - before) / (now - since))

    def grown(self, stages: int) -> float:
        """Return how many times as long a round takes as where plain decoding was last tried.

        It is 1 if that was not tried."""
        if self.plain is None:
            return 1.0
        return self.forwards(stages, self.context) / self.forwards(stages, self.plain[1])

    def plain_token(self, topology: Topology) -> float:
        """Return the seconds of a token without speculation.

        They are those of the last trial, scaled for the context since. Before any trial they follow
        from costs, which leave out the time between forwards and include what drafting takes from
        cores that it shares with the stages."""
        if self.plain is None:
            return self.lap(topology)
        return self.plain[0] * self.grown(topology.stages)

    def credits(self, topology: Topology) -> int:
        """Return the number of batches in flight that keep the slowest stage busy.

        It is the time of one round in forwards of the slowest stage. A batch more would wait at a
        stage all the time; and a segment more would be decided too early: it leaves before the news
        of the one ahead of it."""
        return max(1, round(self.lap(topology) / self.base))

    def _pace(self, rows: int) -> float:
        """Return the seconds that a segment of `rows` rows spends in the slowest stage or link."""
        return max(float(self.times[min(rows, self.MOST)]) if self.costs else 0.0, self.row * rows)

    def idle(self, now: float) -> None:
        """Take in that the first stage was free a hop ago.

        It has nothing to do, unless what was sent meanwhile has reached it."""
        self.free_at = min(self.free_at, now - self.known_hop)

    def returned(self, number: int, now: float) -> None:
        """Take in that a segment of batch `number` came back."""
        if self.waiting.pop(number, None) is not None:
            self.free_at = now
        if number == self._last:  # and nothing has been sent since
            self.free_at = min(self.free_at, now)

    @property
    def room_at(self) -> float:
        """Return when a batch may leave to arrive a little before the first stage is free.

        It is infinity (never) while a batch waits there."""
        return math.inf if self.waiting else self.free_at - self.known_hop - self.EARLY * self.base

    @property
    def known_hop(self) -> float:
        """Return the seconds of the shortest hop; 0 until one was measured."""
        return 0.0 if math.isinf(self.hop) else self.hop

    @property
    def usual_hop(self) -> float:
        """Return the median seconds of recent hops; 0 until one was measured."""
        return median(self.hops) if self.hops else 0.0

    def drafted(self, seconds: float) -> None:
        """Take in the seconds of a drafter's forward.

        The first may have waited for the prompt's features, so a much shorter one replaces the
        mean."""
        self.draft += (seconds - self.draft) * (0.2 if 0 < self.draft < 2 * seconds else 1.0)
