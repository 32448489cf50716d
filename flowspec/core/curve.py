"""A curve gives the time of a stage's forward over its rows and the context behind them.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPE = 50.0
"""This many rows are guessed to add as much as a forward over none takes, where nothing was
measured."""


@dataclass(frozen=True)
class Curve:
    """A curve gives the seconds of a forward over n rows behind a context of some tokens.

    It is made of knots joined by straight lines, and of what one more token of context adds."""

    knots: tuple[tuple[float, float], ...]
    """The knots are at least two pairs (rows, seconds) at `context` tokens, rising in both."""
    deep: tuple[float, float] = (0.0, 0.0)
    """These are the seconds that a token of context adds to a forward, and to each of its rows."""
    context: float = 0.0
    """The knots hold at this many tokens of context."""

    @classmethod
    def line(cls, base: float, slope: float) -> Curve:
        """Return the curve base + slope * n (for n from 1 up), whatever the context."""
        return cls(tuple((float(n), base + slope * n) for n in (1, 128)))

    def over(self, rows: np.ndarray, context: float | None = None) -> np.ndarray:
        """Return the seconds of forwards over `rows` rows each, in the shape of `rows`.

        `context` None means the curve's own. At another one the result is at least a tenth of the
        time at the curve's own."""
        x, y = np.array(self.knots).T
        here = np.interp(rows, x, y) + np.maximum(rows - x[-1], 0) * (y[-1] - y[-2]) / (
            x[-1] - x[-2]
        )
        if context is None:
            return here
        return np.maximum(
            here + (context - self.context) * (self.deep[0] + self.deep[1] * rows), 0.1 * here
        )

    def at(self, rows: float, context: float | None = None) -> float:
        """Return the seconds of one forward, as `over` does."""
        return float(self.over(np.array(rows, float), context))
