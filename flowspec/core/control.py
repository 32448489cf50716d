"""The controller decides how much to spend on speculation, from measured costs and gains.

docs/policy.md, sections 3 and 4, gives the formulas. This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np

from flowspec.core.ring import Ring
from flowspec.core.topology import Topology


class Stretch:
    """A stretch is a run of tokens committed in one mode, with the seconds that they took.

    Seconds are clipped, since a single long delay is due to the machine, not to the mode."""

    LATEST = 16
    """The recent window is the shortest run of last commits with at least this many tokens."""
    STALL = 10.0
    """A commit that took this many times the usual seconds met a link or a machine that stood
    still, which says nothing of the mode."""

    def __init__(self, now: float, clip: float):
        """`clip` is the longest time counted for a commit, as a multiple of the usual time."""
        self._clip = clip
        self._last = now
        self.tokens, self.seconds = 0, 0.0
        self._lately: deque[tuple[int, float]] = deque()  # (tokens, clipped seconds) a commit
        self._count = 0  # tokens in `_lately`

    def decided(self, tokens: int, now: float, usual: float) -> float:
        """Record a commit of `tokens` tokens and return the seconds it took, clipped.

        The clip is a multiple of `usual` (the seconds of a token without speculation) or of the
        recent median per commit, whichever is larger. A stall counts as the larger of these."""
        common = max(usual, median(took for _, took in self._lately) if self._lately else 0.0)
        took, self._last = now - self._last, now
        seconds = common if took > self.STALL * common else min(took, self._clip * common)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self._lately.append((tokens, seconds))
        self._count += tokens
        while self._count - self._lately[0][0] >= self.LATEST:
            self._count -= self._lately.popleft()[0]
        return seconds

    def grew(self, last: int) -> float:
        """Return the median seconds of the `last` latest commits over that of those before.

        Only recent commits count. The ratio is 1 if fewer than `last` earlier commits are known."""
        seconds = [took for _, took in self._lately]
        before, after = seconds[:-last], seconds[-last:]
        return median(after) / max(median(before), 1e-9) if len(before) >= last else 1.0

    @property
    def each(self) -> float:
        """Return the recent seconds per token; infinity if there was no commit."""
        return (
            sum(seconds for _, seconds in self._lately) / self._count if self._count else math.inf
        )


@dataclass
class Findings:
    """Findings hold what speculation has brought, in this request and earlier ones like it."""

    rests: int = 0
    """Speculation was stopped for a rest this many times since it last paid."""
    trials: int = 0
    """This counts trials of plain decoding (halved at each request); each delays the next."""
    since: int = 0
    """This many tokens were committed since plain decoding was last measured."""
    resting: int = 0
    """This many tokens are left of a rest, which goes on in the next request."""
    doubted: float = 0.0
    """This was the scorer's promise when speculation was last stopped."""
    probing: bool = True
    """Probing is allowed: drafting beside plain decoding does not make it slower."""


class Controller:
    """The controller sets the rows of a segment, the segments in flight, and whether to speculate.

    Whether to speculate is settled by trying, and trying is bounded: in all, speculation may lose
    SHARE of the text's plain time. Speculation begins. A trial of plain decoding follows when
    speculation is in doubt (less than DOUBT times the rate that costs promise without it) and the
    trial is cheap, or when speculation has lost a good part of what it may. Speculation that was
    slower rests, twice as long each time. Losses are counted in plain tokens: one plain token is
    the time of one token without speculation."""

    CLIP = (1.5, 3.0)
    """A delay counts only up to this multiple of the usual time: (without speculation, with it).
    The second is larger because times with speculation vary by themselves."""
    LEAST = 0.002
    """`theta`, a probability, is never below this."""
    DOUBT = 1.5
    """Speculation that is faster than this multiple of the promised plain rate needs no trial."""
    FIRST = 8
    """The first doubt may arise after this many tokens."""
    AGAIN = 16
    """Once plain decoding was tried, doubt (by CLOSE) may arise again after this many tokens of
    speculation, times 2 ** `Findings.trials`."""
    CLOSE = 1.25
    """A mode is clearly faster than the other above this ratio of their rates."""
    TRIAL = (2, 3)
    """A trial of plain decoding lasts this many tokens, at least and at most."""
    SHARE = 0.02
    """Speculation may lose this share, in all, of the plain time of the text so far and of the
    tokens that are left (at most AHEAD of them)."""
    AHEAD = 96
    """At most this many of the tokens that are left count for SHARE."""
    PRICE = 0.03
    """A trial of plain decoding may cost this share of the time that is left."""
    LOSS = (0.5, 2.0)
    """An attempt at speculation may lose this many plain tokens, at least and at most; between the
    two, it may lose PART of what is left to lose."""
    PART = 0.6
    """An attempt may lose this share of what is left to lose, within LOSS."""
    HOPE = (0.1, 0.4)
    """These are bounds on the scorer's promise. Below the first, an attempt ends at the least loss.
    Above the second, an attempt may lose PATIENCE if speculation has not rested since it last paid:
    a ring fills slowly, and what is drafted for it is right as often as not."""
    PATIENCE = 4.0
    """A promising attempt that follows no rest may lose this many plain tokens."""
    LEAD = 4.0
    """Gains of at most this many plain tokens are remembered against later losses."""
    PROBES = 3
    """During this many tokens at the end of a rest, roots are drafted from but no draft is sent.
    The drafter's processor is idle while one stage after the other computes one row, and the
    scorer's promise then says whether the text has become easier."""
    DEAR = 1.1
    """Probing ends for good where it makes tokens take this many times as long as those before."""
    LEND = 2.0
    """Speculation may lose this many plain tokens beyond its share if the probes promise at least
    HOPE's second value, at odds at least twice those at which speculation was stopped."""
    REST = (8, 128)
    """The first rest from speculation and the longest one last this many tokens."""
    CHANGED = 1.3
    """Plain decoding is tried anew, if in doubt, once the context has changed the time of a plain
    token by this factor."""
    OLD = 512
    """Plain decoding is tried anew, if in doubt, after this many tokens of the run: the few tokens
    of a trial may have met a busy moment."""

    def __init__(self, ring: Ring, topology: Topology, fixed_rows: int | None, findings: Findings):
        self._ring, self._topology, self._fixed_rows, self._findings = (
            ring,
            topology,
            fixed_rows,
            findings,
        )
        findings.trials //= 2
        self.speculates = findings.resting == 0
        self._now: Stretch | None = None
        self._lead = 0.0  # recent gain of this stretch of speculation on plain decoding, in seconds
        self._until = findings.resting  # tokens that the present stretch of plain decoding lasts
        self._lost = 0.0  # plain tokens that speculation has lost so far
        self._begun = 0  # tokens that were left when the first stretch began
        self._promise, self._judged = 0.0, False
        self._foreseen = 0  # tokens of the text so far, and of at most AHEAD that are left
        self._attempt: Stretch | None = None  # the last attempt at speculation that was stopped
        self._in_flight = 0  # segments of this request
        self._draining = False  # segments of the stopped attempt are still on their way
        self._counted = True  # `_lost` includes the loss of `_attempt`
        self._trial = False  # the present stretch of plain decoding is a trial, not a rest
        self._lent = False  # the present attempt was begun by probes

    # ---- rows ------------------------------------------------------------------------------------
    @property
    def theta(self) -> float:
        """Return the least probability at which a node can be worth a row.

        It is what a row adds, at the number of rows where it is cheapest, as a share of a token's
        time. If a forward takes a + b n and a link e n, and one request is in the ring:
        (b + e) / (a + b + e)."""
        ring, prices = self._ring, self._ring.prices
        token = prices.token(ring.requests / self._topology.stages)
        return max(self.LEAST, prices.least / token)

    @property
    def rows(self) -> int:
        """Return the most rows that a segment may have.

        What a row costs is a guess at first, so segments begin with two rows, and twice as many
        each time the first stage reports its cost."""
        return min(self._ring.MOST, self._fixed_rows or int(2.0 ** min(10, 1 + self._ring.news)))

    @property
    def credits(self) -> int:
        """Return the number of segments in flight that keep the slowest stage busy."""
        return self._ring.credits(self._topology)

    @property
    def lap(self) -> float:
        """Return the seconds of a round with the root alone.

        By these costs, that is the time of a token without speculation."""
        return self._ring.lap(self._topology)

    @property
    def _grown(self) -> float:
        """Return how many times as long a round takes as where plain decoding was last tried."""
        return self._ring.grown(self._topology.stages)

    # ---- whether to speculate --------------------------------------------------------------------
    @property
    def plain(self) -> float:
        """Return the seconds of a token without speculation."""
        return self._ring.plain_token(self._topology)

    def decided(
        self, tokens: int, now: float, left: int, promise: float | None, in_flight: int = 0
    ) -> None:
        """Take in a commit of `tokens` tokens, with `left` still to come; this may switch the mode.

        `in_flight` segments of the request are still on their way. Times say something of a mode
        only while no other request is in the ring. `promise` is the probability that recent drafts
        gave to the target's choices. It is None before a draft was judged: until then (while a
        drafter reads the prompt, say) speculation was not really tried, and the commit does not
        count."""
        self._in_flight = in_flight
        if self._ring.requests > 1:
            self._shared(tokens, now)
            return
        if self._now is None or (promise is None and self.speculates and self._attempt is None):
            self._now, self._begun = Stretch(now, self.CLIP[self.speculates]), left
            return
        self._promise, self._judged = promise or 0.0, promise is not None
        self._foreseen = self._begun - left + min(left, self.AHEAD)
        if self._draining and self._attempt is not None:
            # what was still on its way belongs to the attempt that has ended
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

    def _shared(self, tokens: int, now: float) -> None:
        """Take in a commit of a shared ring: nothing is measured, but a rest comes to its end."""
        self._now = self._attempt = None
        if self.speculates:
            return
        self._until = self._findings.resting = max(0, self._findings.resting - tokens)
        if not self._until:
            self._trial = False
            self._turn(now)
            self._now = None

    @property
    def probes(self) -> bool:
        """Tell whether to draft from roots though nothing is speculated: near the end of a rest."""
        resting = not self.speculates and not self._trial and self._findings.probing
        return resting and self._now is not None and self._until - self._now.tokens <= self.PROBES

    def _regrets(self, stretch: Stretch) -> bool:
        """Tell whether a rest turns out to be clearly slower than the speculation it replaced."""
        attempt = self._attempt
        return (
            attempt is not None
            and not self._trial
            and stretch.tokens >= self.FIRST
            and attempt.each * self.CLOSE < stretch.each
        )

    @property
    def _allowed(self) -> float:
        """Return the plain tokens that speculation may still lose; negative if it has lost more."""
        return self.SHARE * self._foreseen - self._lost

    def _doubt(self, stretch: Stretch, now: float, left: int) -> None:
        """Stop speculation if it has lost enough, or for a trial of plain decoding.

        A trial needs doubt and must be cheap for what it may show."""
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
        """Return the plain tokens that this attempt may lose."""
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
        """Tell whether a rest's probes promise clearly more than the attempt that was stopped.

        The odds p / (1 - p) have to be twice what they were: p itself can only double below a half,
        and what was stopped at 0.45 would never be taken up again."""
        doubted = self._findings.doubted
        enough = max(self.HOPE[1], 2 * doubted / (1 + doubted))
        return self._promise >= enough and self._allowed > -self.LEND

    def _settle(self, stretch: Stretch, now: float) -> None:
        """Record the speed of a stretch of plain decoding, then resume speculation or rest.

        Speculation resumes if it was not slower. After a rest it also resumes if its probes promise
        clearly more, or if it may lose more and they are not hopeless."""
        self._ring.plain, self._findings.since = (stretch.each, self._ring.context), 0
        attempt = self._attempt  # None: the rest began in an earlier request
        if attempt is not None and not self._counted:
            self._lost += attempt.seconds / stretch.each - attempt.tokens
            self._counted = True
        slower = attempt is not None and stretch.each < attempt.each
        if self.probes:
            self._findings.probing = stretch.grew(self.PROBES) < self.DEAR
        trial, self._trial, self._lent = self._trial, False, self._better
        goes_on = attempt is not None and not slower  # speculation was no loss after all
        hopeless = self._judged and self._promise < self.HOPE[0]  # according to the probes
        tries = self._lent or (self._allowed > self.LOSS[0] and not hopeless)
        if goes_on or (not trial and tries):
            self._turn(now)
        else:
            self._until = stretch.tokens + self._rest()

    def _rest(self) -> int:
        """Count a rest and return its length in tokens, twice as many each time."""
        first, longest = self.REST
        self._findings.rests += 1
        return min(longest, first * 2 ** min(10, self._findings.rests - 1))

    def _turn(self, now: float) -> None:
        self.speculates = not self.speculates
        self._draining = not self.speculates and self._in_flight > 0
        self._now, self._lead = Stretch(now, self.CLIP[self.speculates]), 0.0

    @property
    def _tried(self) -> bool:
        """Tell whether plain decoding was tried recently, behind a context like the present one."""
        like_this = self._ring.plain is not None and 1 / self.CHANGED < self._grown < self.CHANGED
        return like_this and self._findings.since < self.OLD

    def explain(self) -> list[str]:
        """Return lines that tell people what was chosen, and why."""
        ring = self._ring
        stages = "; ".join(
            f"{s}: {_forwards(c.over(_SHOWN, ring.context))}" for s, c in sorted(ring.costs.items())
        )
        shown = ", ".join(f"{n:.0f}" for n in _SHOWN)
        lines = [
            f"stages (ms of a forward over {shown} rows, behind {ring.context} tokens): {stages}",
            f"links: {1000 * ring.known_hop:.2f} ms a hop, {1000 * ring.row:.3f} ms a row; "
            f"a draft takes {1000 * ring.draft:.1f} ms",
            f"a row must be needed with P >= {self.theta:.3f} "
            "(what it adds to the slowest stage and link, by what a forward costs)",
            f"at most {self.rows} rows a segment{' (tree.segment)' if self._fixed_rows else ''}, "
            "and of these as many as gain most",
            f"{self.credits} segments in flight "
            "(the slowest stage's forwards in one round of the ring)",
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
            f"speculation {state}: {measured}; without it {plain}; "
            f"rested {rests} times since it last paid"
        )
        return lines


_SHOWN = np.array([1.0, 2, 4, 8, 16, 32, 64])


def _forwards(seconds: np.ndarray) -> str:
    return " ".join(f"{1000 * s:.1f}" for s in seconds)
