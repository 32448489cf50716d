"""A request says what one generation is asked for.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowspec.errors import need

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling says how a token is picked from the target's logits.

    Filters apply in the order temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """Temperature 0 is greedy (argmax)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least min_p times the likeliest one's probability; 0 keeps all."""
    seed: int | None = None
    """The keyed noise has this seed; None (null in a file) draws a seed and reports it."""
    max_new_tokens: int = 128
    """The text has at most this many new tokens."""

    @property
    def filters(self) -> bool:
        """Tell whether any filter takes tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self) -> None:
        need(
            0 <= self.temperature < math.inf,
            f"sampling.temperature is {self.temperature}: it must be 0 (greedy) or more",
        )
        need(self.top_k >= 0, f"sampling.top_k is {self.top_k}: it must be 0 (off) or more")
        need(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}: it must lie in (0, 1]")
        need(0 <= self.min_p <= 1, f"sampling.min_p is {self.min_p}: it must lie in [0, 1]")
        need(
            self.max_new_tokens >= 1,
            f"sampling.max_new_tokens is {self.max_new_tokens}: ask for at least one new token",
        )
        need(
            self.seed is None or 0 <= self.seed <= _MASK,
            f"sampling.seed is {self.seed}: it must lie in [0, 2^64)",
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request is one prompt on its way through the ring.

    Token positions are absolute: the prompt fills [0, prompt_length)."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    eos: frozenset[int] = frozenset()
    """Each of these tokens ends the text, as the last token of the output."""

    @property
    def prompt_length(self) -> int:
        return len(self.prompt)
