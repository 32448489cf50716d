"""Measured costs: a stage's forward over n rows takes base + slope * n seconds. Pure.

POLICY: a row pays for itself while its chance to be needed exceeds slope / base, and a segment should not
take much longer than an empty one: n_max = 0.35 * base / slope.
"""

from __future__ import annotations


class LinearCost:
    """Weighted least squares over the recent past, started from a guess that a few observations outweigh."""

    FORGET = 0.95

    def __init__(self, base: float = 0.02, slope: float = 0.0004):
        self._n = self._t = self._nn = self._nt = self._w = 0.0
        for rows in (1.0, 32.0):
            self._add(rows, base + slope * rows, 0.5)

    def _add(self, rows: float, seconds: float, weight: float) -> None:
        self._w += weight
        self._n += weight * rows
        self._t += weight * seconds
        self._nn += weight * rows * rows
        self._nt += weight * rows * seconds

    def observe(self, rows: int, seconds: float) -> None:
        for name in ("_n", "_t", "_nn", "_nt", "_w"):
            setattr(self, name, getattr(self, name) * self.FORGET)
        self._add(rows, seconds, 1.0)

    @property
    def slope(self) -> float:
        """Seconds a row, never below zero."""
        spread = self._nn - self._n * self._n / self._w
        return max(0.0, (self._nt - self._n * self._t / self._w) / spread) if spread > 1e-9 else 0.0

    @property
    def base(self) -> float:
        """Seconds of a forward over no row; at least a tenth of the mean forward."""
        mean = self._t / self._w
        return max(0.1 * mean, mean - self.slope * self._n / self._w)

    def predict(self, rows: int) -> float:
        return self.base + self.slope * rows
