"""What penalties count of a text, and what biases and penalties make of logits.

They are those of Sampling (core/request.py). A penalty counts tokens of the text before a token, in
a tree those of the node's path. This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from flowspec.core.request import Sampling


class Past:
    """The past is the text before a token, as penalties see it.

    It follows a walk down a tree: what a node's token is picked from counts the node's path."""

    def __init__(self, prompt: Sequence[int], known: int = 0):
        """The last `known` tokens of the prompt are new ones of a text that is gone on with."""
        self._first = len(prompt) - known  # the position of the first new token
        self._tokens = [*prompt]  # by position
        self._asked = frozenset(prompt[: self._first])
        self._new = Counter(prompt[self._first :])

    def reach(self, position: int, token: int) -> None:
        """Let the text end with this token at this absolute position, which is not beyond its end.

        What stood there and behind it is gone."""
        assert position <= len(self._tokens), "a walk leaves out a token"
        self.cut(position)
        self._tokens.append(token)
        if position >= self._first:
            self._new[token] += 1

    def cut(self, position: int) -> None:
        """Let the text end before this position."""
        for at in range(len(self._tokens) - 1, position - 1, -1):
            gone = self._tokens.pop()
            if at >= self._first:
                self._new[gone] -= 1

    @property
    def new(self) -> dict[int, int]:
        """Return how often each of the new tokens is there."""
        return {token: times for token, times in self._new.items() if times}

    @property
    def all(self) -> list[int]:
        """Return the tokens of the prompt and the new ones, each once."""
        return [*self._asked.union(self.new)]


def past_of(sampling: Sampling, prompt: Sequence[int], known: int = 0) -> Past | None:
    """Return the past of a text that begins with this prompt; None if no penalty looks at it."""
    return Past(prompt, known) if sampling.counts else None


def adjust(x: np.ndarray, sampling: Sampling, past: Past | None) -> np.ndarray:
    """Return logits [vocabulary] after biases and penalties, float64.

    A bias is added. Then the repetition penalty r makes x / r of a logit x > 0 and x r of another;
    then the presence and the frequency penalty are taken away. A draft model's vocabulary may lack
    some of the tokens that are counted."""
    x = x.astype(np.float64)  # a copy
    for token, bias in sampling.logit_bias:
        x[token : token + 1] += bias
    if past is not None:
        _penalise(x, sampling, past)
    return x


def _penalise(x: np.ndarray, sampling: Sampling, past: Past) -> None:
    repetition = sampling.repetition_penalty
    if repetition != 1:
        some = [token for token in past.all if token < len(x)]
        x[some] = np.where(x[some] > 0, x[some] / repetition, x[some] * repetition)
    if new := {token: times for token, times in past.new.items() if token < len(x)}:
        times = np.fromiter(new.values(), np.float64)
        x[[*new]] -= sampling.presence_penalty + sampling.frequency_penalty * times
