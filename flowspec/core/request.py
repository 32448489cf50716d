"""A request says what one generation is asked for.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flowspec.errors import UserError, need

_MASK = (1 << 64) - 1
MOST_BIASES = 1024
"""A request biases at most so many tokens."""
MOST_LOGPROBS = 20
"""A request is told of at most so many alternatives to a token."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling says how a token is picked from the target's logits.

    First the logits are adjusted: biases, then penalties. Filters apply to what comes out, in the
    order temperature, top-k, top-p, min-p. The penalties are those of OpenAI's API and, for
    repetition, of CTRL (arXiv 1909.05858); what they count and their order are vLLM's."""

    temperature: float = 0.0
    """Temperature 0 is greedy (argmax)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least min_p times the likeliest one's probability; 0 keeps all."""
    presence_penalty: float = 0.0
    """It is taken from the logit of each token that is among the new ones so far."""
    frequency_penalty: float = 0.0
    """It is taken from a token's logit once for each time it is among the new ones so far."""
    repetition_penalty: float = 1.0
    """The logit of each token of the prompt or among the new ones is divided by it if it is
    positive, else multiplied; 1 changes nothing."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """These are pairs of a token and what is added to its logit, in [-100, 100]. A mapping is taken
    too."""
    logprobs: int | None = None
    """With each token come its log-probability and those of so many of the likeliest tokens; None
    asks for none. They are the target's own, of its logits as they are, before biases, penalties,
    temperature and filters (as vLLM's raw_logprobs)."""
    seed: int | None = None
    """The keyed noise has this seed; None (null in a file) draws a seed and reports it."""
    max_new_tokens: int = 128
    """The text has at most this many new tokens."""

    @property
    def filters(self) -> bool:
        """Tell whether any filter takes tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def counts(self) -> bool:
        """Tell whether a token's logit depends on which tokens stand before it in the text."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def adjusts(self) -> bool:
        """Tell whether logits are changed before the filters."""
        return self.counts or len(self.logit_bias) > 0

    @property
    def highest(self) -> bool:
        """Tell whether the token is that of the highest logit, and nothing more is asked."""
        return self.temperature == 0 and not self.adjusts and self.logprobs is None

    def check(self, vocabulary: int) -> None:
        """Raise UserError if it names a token that a vocabulary of this size lacks."""
        strange = [token for token, _ in self.logit_bias if token >= vocabulary]
        need(
            not strange,
            f"sampling.logit_bias names token {strange[:1]}: the vocabulary has {vocabulary}",
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            need(-2 <= value <= 2, f"sampling.{name} is {value}: it must lie in [-2, 2]")
        need(
            0 < self.repetition_penalty < math.inf,
            f"sampling.repetition_penalty is {self.repetition_penalty}: it must be more than 0",
        )
        need(
            self.logprobs is None
            or (isinstance(self.logprobs, int) and 0 <= self.logprobs <= MOST_LOGPROBS),
            f"sampling.logprobs is {self.logprobs}: it must be a whole number in "
            f"[0, {MOST_LOGPROBS}]",
        )
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


def _biases(given: Mapping[int, float] | Iterable[Iterable[Any]]) -> tuple[tuple[int, float], ...]:
    """Return the pairs of a mapping or of pairs; raise UserError unless they are biases."""
    key, found = "sampling.logit_bias", dict[int, float]()
    try:
        pairs = [(token, bias) for token, bias in dict(given).items()]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{key} is {given!r}: it must map tokens to what is added") from None
    need(
        len(pairs) <= MOST_BIASES,
        f"{key} has {len(pairs)} tokens: {MOST_BIASES} are the most",
    )
    for token, bias in pairs:
        whole = type(token) is int and token >= 0
        need(whole, f"{key} names token {token!r}: it must be a whole number, 0 or more")
        real = type(bias) in (int, float) and -100 <= bias <= 100
        need(real, f"{key} of token {token} is {bias!r}: it must lie in [-100, 100]")
        found[token] = float(bias)
    return tuple(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request is one prompt on its way through the ring.

    Token positions are absolute: the prompt fills [0, prompt_length)."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    eos: frozenset[int] = frozenset()
    """Each of these tokens ends the text, as the last token of the output."""
    known: int = 0
    """So many tokens at the end of the prompt are new ones of a text that is gone on with: a
    penalty counts them as such."""

    @property
    def prompt_length(self) -> int:
        return len(self.prompt)
