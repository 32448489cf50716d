"""Rank 0's picture of the ring. Pure."""

from __future__ import annotations

import math

from flowspec.core.messages import Cost, Started
from flowspec.core.tree import TokenTree


class Pipe:
    """What rank 0 knows of the ring: segments out, when the first stage can take the next one, what things cost (seconds)."""

    EARLY = 1 / 16
    """of a forward: a segment that is late by the wake-up of a thread costs more than one that knows a little less"""

    def __init__(self) -> None:
        self.costs: dict[int, tuple[float, float]] = {}  # stage -> its forward over no row, and each row, once it was measured
        self._rows: dict[int, float] = {}  # stage -> what a row adds to the hop to it
        self.base, self.slope, self.row = 0.02, 0.0004, 0.0  # of the slowest stage and link each; a guess until it is measured
        self.draft = 0.0  # a drafter's forward, once there was one
        self.out: dict[int, tuple[int, ...]] = {}  # number -> ids, while a node of it is alive
        self.waiting: dict[int, float] = {}  # number -> when it was sent, until the first stage starts on it
        self._last = 0  # number of the newest segment
        self.news = 0  # times that the first stage has told its cost
        self.free_at = -math.inf
        self.hop = math.inf  # seconds of one hop: half of the first stage's quickest answer, less the wait in its queue

    def sent(self, number: int, ids: tuple[int, ...], now: float) -> None:
        self.out[number], self.waiting[number], self._last = ids, now, number

    def started(self, event: Started, now: float) -> None:
        sent_at = self.waiting.pop(event.number, None)
        if sent_at is None:  # it came back before this news did
            return
        self.hop = min(self.hop, (now - sent_at - event.waited) / 2)
        # the slowest stage or link sets the pace: what leaves sooner would only wait there
        self.free_at = now + (max(event.expected, self._pace(event.rows)) if event.rows else 0.0) - self.known_hop

    def measured(self, event: Cost) -> None:
        self.costs[event.stage] = event.base, event.slope
        self.news += event.stage == 1
        self._rows[event.stage] = event.row
        self.base, self.slope = (max(column) for column in zip(*self.costs.values(), strict=True))
        self.row = max(self._rows.values())

    def forwards(self, stages: int, rows: int = 0) -> float:
        """Seconds of a forward on each of the stages, one after the other; those not heard of are like the others."""
        known = [base + slope * rows for base, slope in self.costs.values()] or [self.base + self.slope * rows]
        return stages * sum(known) / len(known)

    def _pace(self, rows: int) -> float:
        """Seconds of a segment in the slowest of the stages and links."""
        return max([base + slope * rows for base, slope in self.costs.values()] + [self.row * rows])

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
        self.out = {number: ids for number, ids in self.out.items() if not tree.nodes.keys().isdisjoint(ids)}

    @property
    def room_at(self) -> float:
        """When a segment may leave so that it arrives a little before the first stage is free; never while one waits there."""
        return math.inf if self.waiting else self.free_at - self.known_hop - self.EARLY * self.base

    @property
    def known_hop(self) -> float:
        """Seconds of one hop; 0 until there was one to measure."""
        return 0.0 if math.isinf(self.hop) else self.hop

    def drafted(self, seconds: float) -> None:
        """A drafter's forward took this long. The first may have waited for the prompt's features: a much shorter one tells."""
        known = 0 < self.draft < 2 * seconds
        self.draft += (seconds - self.draft) * (0.2 if known else 1.0)
