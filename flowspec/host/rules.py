"""A rule draws guesses from the draft model's distributions, and says which of them are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowspec.core.request import Sampling
from flowspec.rejection import draw, reject
from flowspec.sampling import filtered, noise_for, pick


class Drawn(NamedTuple):
    """Drawn are the tokens that are guessed for one place, in the order in which they are tried."""

    tokens: list[int]
    branches: list[int]
    """Behind each go on so many branches."""
    q: Tensor | None = None
    """They were drawn from this distribution [vocabulary]; None where the rule needs none."""


class Rule(Protocol):
    """A rule is what one text's guesses are drawn and judged by."""

    def draw(self, logits: Tensor, position: int, branches: int) -> Drawn:
        """Return what is guessed for a position, at which so many branches go on.

        `logits` [vocabulary] are the draft model's there."""

    def judge(
        self, logits: Tensor, position: int, tokens: Sequence[int], q: Tensor | None
    ) -> tuple[int | None, int]:
        """Return which of the guessed tokens is text (None if none is), and the token that is.

        `logits` [vocabulary] are the target's at this position; `q` is what `draw` returned with
        the tokens."""


class Keyed:
    """Both models' tokens are drawn with the same keyed noise (flowspec/sampling.py).

    What is equal is kept, so the text is that of plain decoding with this seed. Greedy tokens are
    the case without noise."""

    SPREAD = 0.6
    """The target's logits are taken to differ from the draft model's by about so much."""

    def __init__(self, sampling: Sampling, vocabulary: int, coupled: bool = True):
        """If it is `coupled`, the noise is known to `chances` too."""
        self._sampling, self._noise = sampling, noise_for(sampling, vocabulary)
        self._coupled = coupled

    def draw(self, logits: Tensor, position: int, branches: int) -> Drawn:
        if branches == 1:  # the rest would say the same, and takes a pass over all tokens
            return Drawn([pick(logits, self._sampling, self._noise, position).token], [1])
        sampling, noise = self._sampling, self._noise
        if noise is None:
            logq = ranked = torch.log_softmax(logits.double(), -1)
        else:
            logq = filtered(logits, sampling)
            ranked = logq + noise(position)[: len(logq)]
        q = logq.exp()
        tokens = ranked.topk(distinct(q, branches)).indices
        return Drawn(tokens.tolist(), shared(q[tokens], branches))

    def chances(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the log of the probability [n, vocabulary], float64, that a token is the target's.

        `logits` [n, vocabulary] are the draft model's at these positions. Uncoupled it is that of
        the draft model, softmax(logits / T). Coupled, the target's token is the argmax of
        logits + T g with noise g that is known and logits that are not quite the draft model's:
        softmax((logits + T g) / SPREAD), which is not at a loss for T = 0 either."""
        sampling, noise = self._sampling, self._noise
        temperature = sampling.temperature or 1.0
        if not self._coupled:
            return torch.log_softmax(logits.double() / temperature, -1)
        if noise is None:
            return torch.log_softmax(logits.double() / self.SPREAD, -1)
        known = torch.stack([noise(position)[: logits.shape[1]] for position in positions])
        x = (
            torch.stack([filtered(row, sampling) for row in logits])
            if sampling.filters
            else logits.double() / temperature
        )
        return torch.log_softmax((x + known) * (temperature / self.SPREAD), -1)

    def judge(
        self, logits: Tensor, position: int, tokens: Sequence[int], q: Tensor | None
    ) -> tuple[int | None, int]:
        token = pick(logits, self._sampling, self._noise, position).token
        return (tokens.index(token) if token in tokens else None), token


class Rejection:
    """Guesses are drawn from the draft model's own distribution, and kept by the papers' rule."""

    def __init__(self, sampling: Sampling):
        assert sampling.temperature > 0 and sampling.seed is not None
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed % (1 << 63))

    def draw(self, logits: Tensor, position: int, branches: int) -> Drawn:
        q = filtered(logits, self._sampling).exp()
        tokens = draw(q[None], distinct(q, branches), self._generator)[0]
        return Drawn(tokens.tolist(), shared(q[tokens], branches), q)

    def judge(
        self, logits: Tensor, position: int, tokens: Sequence[int], q: Tensor | None
    ) -> tuple[int | None, int]:
        p = filtered(logits, self._sampling).exp()
        # tokens that only the target has are never drawn
        q = p if q is None else pad(q, (0, len(p) - len(q)))
        drafted = torch.tensor([[*tokens]], dtype=torch.long)
        which, token = reject(p[None], q[None], drafted, self._generator)
        return (int(which) if which < len(tokens) else None), int(token)


def distinct(q: Tensor, branches: int) -> int:
    """Return how many different tokens so many branches would go on with, on average.

    That is the sum of 1 - (1 - q)^branches, rounded, if each drew its own from q [vocabulary]. So
    much is known before anything is drawn: a number that came of the draws would bend them."""
    if branches == 1:
        return 1
    mean = float((1 - (1 - q) ** branches).sum())
    return max(1, min(round(mean), int((q > 0).sum())))


def shared(chances: Tensor, branches: int) -> list[int]:
    """Return how many branches go on behind each of n tokens [n], in proportion to their chances.

    Each has at least one; what is left by rounding down goes to the first."""
    more = branches - len(chances)
    shares = [1 + int(more * chance) for chance in (chances / chances.sum()).tolist()]
    shares[0] += branches - sum(shares)
    return shares
