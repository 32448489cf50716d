"""What to spend on speculation, by what things cost here and what speculation has brought so far (POLICY section 5). Pure."""

from __future__ import annotations

import math

from flowspec.core.pipe import Pipe


class Controller:
    """Rows of a segment, the least probability of a row, segments in flight, and whether to speculate at all."""

    WINDOW = 16
    """tokens over which a rate is measured"""
    PROMISED = 0.9
    """of the rate that costs promise for plain decoding, until it was tried: they leave out what lies between forwards and hops"""
    PAUSE = 16
    """tokens of the first attempt without speculation; each attempt that was right doubles the next"""

    def __init__(self, pipe: Pipe, stages: int, fixed_rows: int | None):
        self._pipe, self._stages, self._fixed_rows = pipe, stages, fixed_rows
        self.speculates = True
        self._begun: float | None = None  # when the present window began
        self._done = 0  # tokens in it
        self._pause = self.PAUSE
        self.rate: float | None = None  # tokens/s with speculation, of the last window
        self.plain_rate: float | None = None  # without, once it was tried
        self.attempts = 0  # windows without speculation

    @property
    def theta(self) -> float:
        """A row is worth its cost while P >= (b + e) / (a + b + e), of the slowest stage and link: what it adds to a forward's time, as
        a share of what a forward of its own would take."""
        more = self._pipe.slope + self._pipe.row
        return max(0.002, more / (self._pipe.base + more))

    @property
    def rows(self) -> int:
        """The rows of a segment should not add more than half a forward, links included: what is left out leaves in the next slot.
        Where there is no other slot (one stage), theta alone decides. What a row costs is a guess at first, so the first
        segments are short: two rows, and twice as many each time that the first stage has told its cost."""
        if self._fixed_rows:
            return self._fixed_rows
        most = 0.5 * self._pipe.base / max(self._pipe.slope + self._pipe.row, 1e-9) if self._stages > 1 else math.inf
        return int(min(96, max(1, most), 2.0 ** (1 + self._pipe.news)))

    @property
    def credits(self) -> int:
        """Segments that keep the slowest stage busy: as many of its forwards as one needs for the round, links included. One more
        would be decided too early: it leaves before the news that the one ahead of it brings."""
        return max(1, round((self._pipe.forwards(self._stages) + (self._stages + 1) * self._pipe.known_hop) / self._pipe.base))

    @property
    def lap(self) -> float:
        """Seconds that the root alone needs for the round: a token's, without speculation."""
        return self._pipe.forwards(self._stages, rows=1) + (self._stages + 1) * self._pipe.known_hop

    def decided(self, tokens: int, now: float) -> None:
        """So many more tokens are text. At the end of a window: was it worth it?"""
        if self._begun is None:
            self._begun = now
            return
        self._done += tokens
        if self._done < (self.WINDOW if self.speculates else self._pause) or now <= self._begun:
            return
        self._judge(self._done / (now - self._begun))
        self._begun, self._done = now, 0

    def _judge(self, rate: float) -> None:
        """Go on with what is faster. Plain decoding is tried when it promises more, and speculation tried again after it."""
        if self.speculates:
            self.rate = rate
            self.speculates = rate >= (self.plain_rate or self.PROMISED / self.lap)
            if self.speculates:
                self._pause = self.PAUSE
            else:
                self.attempts += 1
        else:
            self.plain_rate, self.speculates = rate, True
            self._pause *= 2

    def explain(self) -> list[str]:
        """What was chosen, and why; for people."""
        pipe = self._pipe
        stages = ", ".join(f"{s}: {1000 * a:.2f} + {1000 * b:.3f} n" for s, (a, b) in sorted(pipe.costs.items()))
        lines = [
            f"stages (ms of a forward over n rows): {stages}",
            f"links: {1000 * pipe.known_hop:.2f} ms a hop, {1000 * pipe.row:.3f} ms a row; a draft takes {1000 * pipe.draft:.1f} ms",
            f"a row must be needed with P >= {self.theta:.3f} (what it adds to the slowest stage and link, by what a forward costs)",
            f"at most {self.rows} rows a segment"
            + (" (tree.segment)" if self._fixed_rows else " (half a forward's worth, on the slowest stage and link)"),
            f"{self.credits} segments in flight (the slowest stage's forwards in one round of the ring)",
        ]
        measured = "not measured (too short)" if self.rate is None else f"{self.rate:.2f} tok/s in the last {self.WINDOW} tokens"
        plain = f"{1 / self.lap:.2f} tok/s by these costs" if self.plain_rate is None else f"{self.plain_rate:.2f} tok/s measured"
        lines.append(
            f"speculation {'on' if self.speculates else 'off'}: {measured}; without it {plain}; tried without {self.attempts} times"
        )
        return lines
