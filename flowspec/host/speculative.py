"""Speculative decoding in one process: a draft model guesses a few tokens, the target checks them.

`ar` is the case of no guesses. What is kept of them is a rule's matter: `rejection` keeps the
target's distribution (flowspec/rejection.py), `keyed` draws every token with the same keyed noise
on both sides and keeps what is equal, so that the text is that of plain decoding with this seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowspec.core.request import Request, Sampling
from flowspec.host.reader import Reader, Whole
from flowspec.rejection import reject
from flowspec.sampling import filtered, noise_for, pick

ORIGINS = ("draft", "resampled", "bonus", "plain")
"""A token was accepted from the draft, drawn by the target in the place of a rejected one, drawn by
the target behind a draft of which all was accepted, or drawn where nothing was guessed."""


class Written(NamedTuple):
    """A token of the output."""

    token: int
    origin: str
    """It is one of ORIGINS."""


class Rule(Protocol):
    """A rule draws the guesses of one text, and says what is kept of them."""

    def guess(self, logits: Tensor, position: int) -> int:
        """Return the draft model's token at a position, by its logits [vocabulary]."""

    def judge(self, logits: Tensor, guesses: Sequence[int], position: int) -> tuple[int, int]:
        """Return how many of the latest guesses are text, and the token that follows them.

        The first stands at `position`; `logits` [n + 1, vocabulary] are the target's there and
        behind."""


class Keyed:
    """Both models' tokens are drawn with the same keyed noise (flowspec/sampling.py)."""

    def __init__(self, sampling: Sampling, vocabulary: int):
        self._sampling, self._noise = sampling, noise_for(sampling, vocabulary)

    def guess(self, logits: Tensor, position: int) -> int:
        return pick(logits, self._sampling, self._noise, position).token

    def judge(self, logits: Tensor, guesses: Sequence[int], position: int) -> tuple[int, int]:
        for k, row in enumerate(logits):
            token = self.guess(row, position + k)
            if k == len(guesses) or token != guesses[k]:
                return k, token
        raise AssertionError("logits [n + 1, vocabulary] for n guesses")


class Rejection:
    """Guesses are drawn from the draft model's own distribution, and kept by the papers' rule."""

    def __init__(self, sampling: Sampling):
        assert sampling.temperature > 0 and sampling.seed is not None
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed % (1 << 63))
        self._drawn_from: list[Tensor] = []

    def guess(self, logits: Tensor, position: int) -> int:
        q = filtered(logits, self._sampling).exp()
        self._drawn_from.append(q)
        return int(torch.multinomial(q, 1, generator=self._generator))

    def judge(self, logits: Tensor, guesses: Sequence[int], position: int) -> tuple[int, int]:
        p = torch.stack([filtered(row, self._sampling).exp() for row in logits])
        q = torch.stack(self._drawn_from) if guesses else p[:0]
        q = pad(q, (0, p.shape[1] - q.shape[1]))  # tokens that only the target has
        self._drawn_from = []
        kept = reject(
            p[None], q[None], torch.tensor([[*guesses]], dtype=torch.long), self._generator
        )
        return int(kept.accepted), int(kept.token)


def write(
    request: Request, rule: Rule, target: Reader, draft: Reader | None, gamma: int
) -> Iterator[list[Written]]:
    """Yield the tokens of the text, as many at a time as a forward of the target brings.

    `gamma` tokens are guessed for each; without a draft model none are (method ar)."""
    text, left = [*request.prompt], request.sampling.max_new_tokens
    while left:
        guesses = _guesses(text, rule, draft, min(gamma, left - 1)) if draft else []
        begun = len(text)
        logits = target.logits([*text, *guesses], len(guesses) + 1)
        accepted, token = rule.judge(logits, guesses, begun)
        last = "resampled" if accepted < len(guesses) else "bonus" if guesses else "plain"
        made = [Written(guess, "draft") for guess in guesses[:accepted]] + [Written(token, last)]
        ends = [k for k, (token, _) in enumerate(made, 1) if token in request.eos]
        made = made[: min(ends, default=len(made))]
        yield made
        left = 0 if ends else left - len(made)
        text += [written.token for written in made]
        for reader in (target, draft) if draft else (target,):
            reader.take_back(begun + accepted)


def _guesses(text: Sequence[int], rule: Rule, draft: Reader, n: int) -> list[int]:
    guesses: list[int] = []
    while len(guesses) < n:
        [logits] = draft.logits([*text, *guesses], 1)
        guesses.append(rule.guess(logits, len(text) + len(guesses)))
    return guesses


class Begun(NamedTuple):
    """A text is begun."""

    blocks: Iterator[list[Written]]
    """Its tokens come as many at a time as a forward of the target brings."""
    forwards: Callable[[], dict[str, int]]
    """This says how many forwards of the target and of the drafter there were."""


class Pair:
    """A pair is a target and a draft model, by these names, and how guesses are judged."""

    def __init__(self, models: Mapping[str, Whole], rule: str, gamma: int):
        """`rule` is rejection or keyed; a greedy text is the same by both."""
        self._models, self._rule, self._gamma = models, rule, gamma

    def begin(self, request: Request, drafter: str | None) -> Begun:
        """Begin a text. What guesses is the draft model, the target itself or nothing (None)."""
        sampling, target = request.sampling, Reader(self._models["target"])
        draft = Reader(self._models[drafter]) if drafter else None
        keyed = self._rule == "keyed" or draft is None or sampling.temperature == 0
        vocabulary = self._models["target"].vocabulary
        rule: Rule = Keyed(sampling, vocabulary) if keyed else Rejection(sampling)
        readers = {"target": target} | ({"draft": draft} if draft else {})
        return Begun(
            write(request, rule, target, draft, self._gamma),
            lambda: {f"{name}_forwards": reader.forwards for name, reader in readers.items()},
        )
