"""What a stage's forward takes, as a curve over its rows and the context behind them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPE = 50.0
"""rows that add as much as a forward over none takes: a guess, where nothing was measured"""


@dataclass(frozen=True)
class Curve:
    """Seconds of a forward over n rows behind a context of so many tokens: knots joined by straight lines, and what a token more adds."""

    knots: tuple[tuple[float, float], ...]
    """(rows, seconds) at `context` tokens, rising in both; two at least"""
    deep: tuple[float, float] = (0.0, 0.0)
    """seconds that a token of context adds to a forward, and to each row of it"""
    context: float = 0.0

    @classmethod
    def line(cls, base: float, slope: float) -> Curve:
        """base + slope * n, whatever the context."""
        return cls(tuple((float(n), base + slope * n) for n in (1, 128)))

    def over(self, rows: np.ndarray, context: float | None = None) -> np.ndarray:
        """Seconds of forwards over so many rows each; without `context`, at the curve's own."""
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
        return float(self.over(np.array(rows, float), context))
