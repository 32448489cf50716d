"""What to spend on speculation, by what things cost here and what speculation has brought so far (POLICY section 5). Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from flowspec.core.ring import Ring
from flowspec.core.topology import Topology


class Stretch:
    """Tokens of a while in one mode, and what they took. Seconds are clipped: one long delay is the machine's."""

    LATEST = 16
    """tokens that count as lately"""

    def __init__(self, now: float, clip: float):
        """`clip`: times what is usual."""
        self._clip = clip
        self._last = now
        self.tokens, self.seconds = 0, 0.0
        self._lately: deque[tuple[int, float]] = deque()
        self._count = 0  # tokens of these

    def decided(self, tokens: int, now: float, usual: float) -> float:
        """So many tokens more are text; the seconds that they took, clipped. `usual`: of a token without speculation."""
        most = self._clip * max(
            usual, median(took for _, took in self._lately) if self._lately else 0.0
        )
        seconds, self._last = min(now - self._last, most), now
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self._lately.append((tokens, seconds))
        self._count += tokens
        while self._count - self._lately[0][0] >= self.LATEST:
            self._count -= self._lately.popleft()[0]
        return seconds

    def grew(self, last: int) -> float:
        """The seconds of the last so many decisions over those of the ones before (medians, lately); 1 where there are too few."""
        seconds = [took for _, took in self._lately]
        before, after = seconds[:-last], seconds[-last:]
        return median(after) / max(median(before), 1e-9) if len(before) >= last else 1.0

    @property
    def each(self) -> float:
        """Seconds of a token, lately."""
        return (
            sum(seconds for _, seconds in self._lately) / self._count if self._count else math.inf
        )


@dataclass
class Findings:
    """What speculation has brought so far, in this request and in earlier ones like it."""

    rests: int = 0
    """times that it was stopped since it last paid"""
    trials: int = 0
    """of plain decoding, lately: fewer are needed the more there were"""
    since: int = 0
    """tokens since the last of them"""
    resting: int = 0
    """tokens that are left of a rest: it goes on in the next request"""
    doubted: float = 0.0
    """the scorer's promise when speculation was stopped last"""
    probing: bool = True
    """drafting beside plain decoding does not make it slower"""


class _Prices(NamedTuple):
    """What rows cost, in seconds, links included."""

    times: np.ndarray
    """what they were made of"""
    more: np.ndarray
    """[MOST + 1]: what 0 (as good as 1), 1, ... rows add to a forward of one"""
    forward: float
    """a forward of one row"""
    least: float
    """what a row adds in the cheapest number of rows, as a share of a forward"""
    round: float
    """a forward of one row on each stage"""
    grown: float
    """times what a round was when plain decoding was tried, as the context has grown; 1 if it was not"""

    @classmethod
    def of(cls, ring: Ring, stages: int) -> _Prices:
        times, n = ring.times, np.arange(ring.MOST + 1)
        more = times - times[1] + ring.row * np.maximum(n - 1, 0)
        forward = ring.base + ring.row
        least = float((more[2:] / n[1:-1]).min()) / forward
        now, tried = ring.forwards(stages, ring.context), ring.plain
        return cls(
            times,
            more,
            forward,
            least,
            now,
            now / ring.forwards(stages, tried[1]) if tried else 1.0,
        )


class Controller:
    """Rows of a segment, which are worth it, segments in flight, and whether to speculate at all.

    Whether to speculate is settled by trying, and trying is bounded: what was slower may cost SHARE of the text in all. Speculation begins.
    A trial of plain decoding follows when it is in doubt (it brings less than DOUBT times what costs promise without it) and cheap, or
    when speculation has lost a good part of what it may. What was slower rests, twice as long each time."""

    CLIP = (1.5, 3.0)
    """times what is usual, beyond which a delay does not count: without speculation, and with it, whose times vary by themselves"""
    LEAST = 0.002
    """of a node's probability"""
    DOUBT = 1.5
    """times the promised rate: what is faster needs no trial"""
    FIRST = 8
    """tokens after which there may be a first doubt"""
    AGAIN = 16
    """tokens of speculation, times two to the number of trials, after which there may be doubt again: by CLOSE"""
    CLOSE = 1.25
    """times the rate of plain decoding"""
    TRIAL = (2, 3)
    """tokens of a trial of plain decoding, at least and at most"""
    SHARE = 0.02
    """of the plain time of the text so far and of what is left, at most AHEAD tokens: what speculation may lose in all"""
    AHEAD = 96
    PRICE = 0.03
    """of the time that is left: what a trial of plain decoding may cost"""
    LOSS = (0.5, 2.0)
    """tokens' plain time that an attempt at speculation may lose, at least and at most; between them PART of what is left to lose"""
    PART = 0.6
    HOPE = (0.1, 0.4)
    """of the scorer's promise. Below the first an attempt ends at the least loss; above the second it may lose PATIENCE, at the first time:
    a ring fills slowly, and what is drafted for it is right as often as not"""
    PATIENCE = 4.0
    LEAD = 4.0
    """tokens' plain time of gains that are remembered against later losses"""
    PROBES = 3
    """tokens at the end of a rest whose roots are drafted from, though nothing of it is sent: while one stage after the other computes
    one row, the drafter's processor is idle, and the scorer's promise says whether the text has become easier"""
    DEAR = 1.1
    """times the seconds of the tokens before: where probes make tokens that slow, nothing is probed any more"""
    LEND = 2.0
    """tokens' plain time that speculation may lose beyond its share where the probes promise twice what it was stopped at, and more than
    HOPE's second"""
    REST = (8, 128)
    """tokens that a rest from speculation lasts, the first and the longest"""
    CHANGED = 1.3
    """times what it was: what the growing context makes of a plain token's time before it is tried anew, if in doubt"""
    OLD = 512
    """tokens of the run after which what a trial found is to be tried anew, if in doubt: the few tokens of it may have met a busy moment"""

    def __init__(self, ring: Ring, topology: Topology, fixed_rows: int | None, findings: Findings):
        self._ring, self._topology, self._fixed_rows, self._findings = (
            ring,
            topology,
            fixed_rows,
            findings,
        )
        findings.trials //= 2
        self._prices = _Prices.of(ring, topology.stages)
        self.speculates = findings.resting == 0
        self._now: Stretch | None = None
        self._lead = (
            0.0  # seconds that this stretch of speculation has gained on plain decoding, of late
        )
        self._until = findings.resting  # tokens that the present stretch of plain decoding lasts
        self._lost = 0.0  # plain tokens' time that speculation has lost so far
        self._begun = 0  # tokens that were left then
        self._promise, self._judged = 0.0, False
        self._foreseen = 0  # tokens of the text so far and ahead
        self._attempt: Stretch | None = None  # the last at speculation
        self._draining = False  # what speculation sent is still on its way
        self._counted = True  # what it lost is in `_lost`
        self._trial = False  # the present stretch of plain decoding is one
        self._lent = False  # probes have begun this attempt

    # ---- rows --------------------------------------------------------------------------------------
    def _priced(self) -> _Prices:
        if self._prices.times is not self._ring.times:
            self._prices = _Prices.of(self._ring, self._topology.stages)
        return self._prices

    @property
    def theta(self) -> float:
        """The least probability of a node that can be worth a row: what a row adds, in the cheapest number of them, as a share of what a
        forward of its own would take. On a line a + b n with links e n: (b + e) / (a + b + e)."""
        return max(self.LEAST, self._priced().least)

    @property
    def rows(self) -> int:
        """The most rows of a segment. What a row costs is a guess at first, so the first segments are short: two rows, and twice as many
        each time that the first stage has told its cost."""
        return min(self._ring.MOST, self._fixed_rows or int(2.0 ** min(10, 1 + self._ring.news)))

    def worth(self, reaches: Sequence[float]) -> int:
        """How many of a segment's nodes to send, given their probabilities to be needed, falling: as many as gain most. A node that is
        needed saves a forward of its own; what it adds to this one delays everything."""
        if len(reaches) < 2:
            return len(reaches)
        prices = self._priced()
        gain = np.cumsum(reaches) * prices.forward - prices.more[1 : len(reaches) + 1]
        return int(gain.argmax()) + 1

    @property
    def credits(self) -> int:
        """Segments that keep the slowest stage busy: as many of its forwards as one needs for the round, links included. One more
        would be decided too early: it leaves before the news that the one ahead of it brings."""
        return max(1, round(self.lap / self._ring.base))

    @property
    def lap(self) -> float:
        """Seconds that the root alone needs for the round: a token's, without speculation, by these costs."""
        return self._priced().round + self._topology.hops * self._ring.known_hop

    # ---- whether to speculate ----------------------------------------------------------------------
    @property
    def plain(self) -> float:
        """Seconds of a token without speculation: as tried, and as the context has grown since; else by costs, which leave out what
        lies between forwards, and hold what drafting takes from the same cores."""
        tried = self._ring.plain
        return self.lap if tried is None else tried[0] * self._priced().grown

    def decided(self, tokens: int, now: float, left: int, promise: float | None) -> None:
        """So many more tokens are text, and so many are left. `promise`: the probability that drafts gave to what was chosen, of late;
        None before a draft was judged: until then (a drafter reads the prompt, say) nothing was tried."""
        if self._now is None or (promise is None and self.speculates and self._attempt is None):
            self._now, self._begun = Stretch(now, self.CLIP[self.speculates]), left
            return
        self._promise, self._judged = promise or 0.0, promise is not None
        self._foreseen = self._begun - left + min(left, self.AHEAD)
        if (
            self._draining and self._attempt is not None
        ):  # what was on its way belongs to the attempt that has ended
            self._attempt.decided(tokens, now, self.plain)
            self._draining, self._now = tokens > 1, Stretch(now, self.CLIP[False])
            return
        took = self._now.decided(tokens, now, self.plain)
        self._findings.since += tokens
        if not self._ring.costs:
            return
        if self.speculates:
            self._lead = min(self._lead + tokens * self.plain - took, self.LEAD * self.plain)
            if self._lead == self.LEAD * self.plain and self._now.each * self.CLOSE < self.plain:
                self._findings.rests = 0
            self._doubt(self._now, now, left)
        else:
            self._findings.resting = (
                0 if self._regrets(self._now) else max(0, self._until - self._now.tokens)
            )
            if not self._findings.resting:
                self._settle(self._now, now)

    @property
    def probes(self) -> bool:
        """Whether to draft from roots while nothing is speculated: near the end of a rest."""
        resting = not self.speculates and not self._trial and self._findings.probing
        return resting and self._now is not None and self._until - self._now.tokens <= self.PROBES

    def _regrets(self, stretch: Stretch) -> bool:
        """Plain decoding turns out to be clearly slower than what was stopped for it."""
        attempt = self._attempt
        return (
            attempt is not None
            and not self._trial
            and stretch.tokens >= self.FIRST
            and attempt.each * self.CLOSE < stretch.each
        )

    @property
    def _allowed(self) -> float:
        """Plain tokens' time that is left to lose."""
        return self.SHARE * self._foreseen - self._lost

    def _doubt(self, stretch: Stretch, now: float, left: int) -> None:
        """Is speculation to rest? If it has lost enough, or for a trial if that is cheap for what it may show."""
        ratio, tried = self.plain / stretch.each, self._tried
        lost = -self._lead > self.plain * self._bearable
        lost = lost or (tried and ratio < 1 and stretch.tokens >= stretch.LATEST)
        trial = min(self.TRIAL[1], self.PRICE * left / max(ratio - 1, 1e-3))
        doubt, after = (
            (self.CLOSE, self.AGAIN * 2**self._findings.trials)
            if tried
            else (self.DOUBT, self.FIRST)
        )
        unsure = ratio < doubt and stretch.tokens >= after and trial >= self.TRIAL[0]
        if lost or unsure:
            self._attempt, self._counted, self._trial = stretch, False, unsure or not tried
            self._findings.doubted = self._promise
            self._findings.trials += self._trial
            self._until = int(max(trial, self.TRIAL[0])) if self._trial else self._rest()
            self._turn(now)

    @property
    def _bearable(self) -> float:
        """Plain tokens' time that this attempt may lose."""
        (least, most), (low, high) = self.LOSS, self.HOPE
        if self._promise < low:
            return least
        if self._promise > high and not self._findings.rests:
            return self.PATIENCE
        if self._promise > high and self._lent:
            return most
        return min(most, max(least, self.PART * self._allowed))

    @property
    def _better(self) -> bool:
        """The probes of a rest promise clearly more than what was stopped."""
        enough = max(self.HOPE[1], 2 * self._findings.doubted)
        return self._promise >= enough and self._allowed > -self.LEND

    def _settle(self, stretch: Stretch, now: float) -> None:
        """A stretch of plain decoding is over. After a trial: was it faster?"""
        self._ring.plain, self._findings.since = (stretch.each, self._ring.context), 0
        self._prices = self._prices._replace(grown=1.0)
        attempt = self._attempt  # None: the rest began in an earlier request
        if attempt is not None and not self._counted:
            self._lost += attempt.seconds / stretch.each - attempt.tokens
            self._counted = True
        slower = attempt is not None and stretch.each < attempt.each
        if self.probes:
            self._findings.probing = stretch.grew(self.PROBES) < self.DEAR
        trial, self._trial, self._lent = self._trial, False, self._better
        goes_on = attempt is not None and not slower  # it was no loss after all
        hopeless = self._judged and self._promise < self.HOPE[0]  # say the probes
        tries = self._lent or (self._allowed > self.LOSS[0] and not hopeless)
        if goes_on or (not trial and tries):
            self._turn(now)
        else:
            self._until = stretch.tokens + self._rest()

    def _rest(self) -> int:
        """Tokens of plain decoding: twice as many each time."""
        first, longest = self.REST
        self._findings.rests += 1
        return min(longest, first * 2 ** min(10, self._findings.rests - 1))

    def _turn(self, now: float) -> None:
        self.speculates = not self.speculates
        self._draining = not self.speculates and bool(self._ring.out)
        self._now, self._lead = Stretch(now, self.CLIP[self.speculates]), 0.0

    @property
    def _tried(self) -> bool:
        """Plain decoding was tried not long ago, behind a context like this."""
        like_this = (
            self._ring.plain is not None and 1 / self.CHANGED < self._priced().grown < self.CHANGED
        )
        return like_this and self._findings.since < self.OLD

    def explain(self) -> list[str]:
        """What was chosen, and why; for people."""
        ring = self._ring
        stages = "; ".join(
            f"{s}: {_forwards(c.over(_SHOWN, ring.context))}" for s, c in sorted(ring.costs.items())
        )
        shown = ", ".join(f"{n:.0f}" for n in _SHOWN)
        lines = [
            f"stages (ms of a forward over {shown} rows, behind {ring.context} tokens): {stages}",
            f"links: {1000 * ring.known_hop:.2f} ms a hop, {1000 * ring.row:.3f} ms a row; a draft takes {1000 * ring.draft:.1f} ms",
            f"a row must be needed with P >= {self.theta:.3f} (what it adds to the slowest stage and link, by what a forward costs)",
            f"at most {self.rows} rows a segment{' (tree.segment)' if self._fixed_rows else ''}, and of these as many as gain most",
            f"{self.credits} segments in flight (the slowest stage's forwards in one round of the ring)",
        ]
        attempt = self._now if self.speculates else self._attempt
        each = math.inf if attempt is None else attempt.each
        measured = (
            "not measured (too short)" if math.isinf(each) else f"{1 / each:.2f} tok/s lately"
        )
        plain = (
            f"{1 / self.plain:.2f} tok/s {'by these costs' if ring.plain is None else 'measured'}"
        )
        state, rests = "on" if self.speculates else "off", self._findings.rests
        lines.append(
            f"speculation {state}: {measured}; without it {plain}; rested {rests} times since it last paid"
        )
        return lines


_SHOWN = np.array([1.0, 2, 4, 8, 16, 32, 64])


def _forwards(seconds: np.ndarray) -> str:
    return " ".join(f"{1000 * s:.1f}" for s in seconds)
