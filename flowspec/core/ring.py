"""Rank 0's picture of the ring: what things cost there, and what is on its way. Pure."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import numpy as np

from flowspec.core.curve import SHAPE, Curve
from flowspec.core.messages import Cost, Started
from flowspec.core.tree import TokenTree


class Ring:
    """What rank 0 knows of the ring (seconds), and what is on its way there. It outlives requests; `begin` forgets what was on its way."""

    EARLY = 1 / 16
    """of a forward: a segment that is late by the wake-up of a thread costs more than one that knows a little less"""
    MOST = 96
    """rows of a segment"""
    LATEST = 65
    GUESS = Curve.line(0.02, 0.02 / SHAPE)

    def __init__(self) -> None:
        self.costs: dict[int, Curve] = {}
        """stage -> its forwards, once it has told of them"""
        self.rows: dict[int, float] = {}
        """stage -> what a row adds to the hop to it"""
        self.hop = math.inf
        """one hop: half of the first stage's quickest answer, less the wait in its queue"""
        self.hops: deque[float] = deque(maxlen=self.LATEST)
        """the latest such halves, wake-ups of a busy machine included"""
        self.draft = 0.0
        """a drafter's forward, once there was one"""
        self.news = 0
        """times that the first stage has told its cost"""
        self.plain: tuple[float, int] | None = None
        """a token's time without speculation, once it was tried, and the context behind which it was"""
        self.begin(0)

    def begin(self, context: int) -> None:
        """A request whose prompt is so long; nothing of another is on its way any more."""
        self.out: dict[int, tuple[int, ...]] = {}  # number -> ids, while a node of it is alive
        self.waiting: dict[
            int, float
        ] = {}  # number -> when it was sent, until the first stage starts on it
        self._last = 0  # number of the newest segment
        self.free_at = -math.inf
        self.context = context
        self._times: np.ndarray | None = None

    def sent(self, number: int, ids: tuple[int, ...], now: float) -> None:
        self.out[number], self.waiting[number], self._last = ids, now, number

    def started(self, event: Started, now: float) -> None:
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

    def measured(self, event: Cost) -> None:
        self.costs[event.stage] = event.forward
        self.rows[event.stage] = event.row
        self.news += event.stage == 1
        self._times = None

    def deepened(self, context: int) -> None:
        """The stages' caches hold so many tokens now."""
        if self.context <= context <= 16 + self.context * 33 // 32:  # next to nothing changes
            return
        self.context, self._times = context, None

    @property
    def times(self) -> np.ndarray:
        """Seconds of a forward over 0 (as good as 1), 1, ... MOST rows on the slowest stage, here and now; a guess until it is measured."""
        if self._times is None:
            rows = np.maximum(np.arange(self.MOST + 1.0), 1)
            self._times = np.max(
                [curve.over(rows, self.context) for curve in self.costs.values() or [self.GUESS]], 0
            )
        return self._times

    @property
    def base(self) -> float:
        """Seconds of a forward over one row on the slowest stage."""
        return float(self.times[1])

    @property
    def row(self) -> float:
        """What a row adds to a hop, on the slowest link."""
        return max(self.rows.values(), default=0.0)

    def forwards(self, stages: int, context: int) -> float:
        """Seconds of a forward over one row on each of the stages, one after the other; those not heard of are like the others."""
        seconds = [curve.at(1, context) for curve in self.costs.values() or [self.GUESS]]
        return stages * sum(seconds) / len(seconds)

    def _pace(self, rows: int) -> float:
        """Seconds of a segment in the slowest of the stages and links."""
        return max(float(self.times[min(rows, self.MOST)]) if self.costs else 0.0, self.row * rows)

    def idle(self, now: float) -> None:
        """The first stage has nothing to do, unless what was sent meanwhile has reached it."""
        self.free_at = min(self.free_at, now - self.known_hop)

    def returned(self, number: int, now: float) -> None:
        self.out.pop(number, None)
        if self.waiting.pop(number, None) is not None:
            self.free_at = now
        if number == self._last:  # and nothing has been sent since
            self.free_at = min(self.free_at, now)

    def drop_dead(self, tree: TokenTree) -> None:
        """A segment none of whose nodes is alive need not come back."""
        self.out = {
            number: ids for number, ids in self.out.items() if not tree.nodes.keys().isdisjoint(ids)
        }

    @property
    def room_at(self) -> float:
        """When a segment may leave so that it arrives a little before the first stage is free; never while one waits there."""
        return math.inf if self.waiting else self.free_at - self.known_hop - self.EARLY * self.base

    @property
    def known_hop(self) -> float:
        """Seconds of one hop; 0 until there was one to measure."""
        return 0.0 if math.isinf(self.hop) else self.hop

    @property
    def usual_hop(self) -> float:
        """Seconds that a hop takes as a rule; 0 until there was one to measure."""
        return median(self.hops) if self.hops else 0.0

    def drafted(self, seconds: float) -> None:
        """A drafter's forward took this long. The first may have waited for the prompt's features: a much shorter one tells."""
        self.draft += (seconds - self.draft) * (0.2 if 0 < self.draft < 2 * seconds else 1.0)
