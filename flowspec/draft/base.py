"""What a drafter is, and how one is chosen. A drafter only guesses: nothing it does can change the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import KEPT, Commit, Drafted, DraftNode
from flowspec.core.request import Request

Noise = Callable[[int], Tensor]
"""position -> the target's keyed Gumbel noise, float64 [vocabulary]"""
COVERAGE = 0.97
"""how often the target's choice is among them"""


class Session(Protocol):
    """A request in a drafter."""

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        """These tokens are text now, and only what is below `commit.root` lives on.

        features: [len(commit.path), hidden], the target's at these nodes; None if not wanted, or if they come by `learn`."""

    def learn(self, features: Tensor) -> None:
        """The target's features [n, width] at the next tokens of the text, in its order."""
        return None


Asks = Sequence[tuple[Any, Sequence[DraftNode]]]
"""pairs of a session, which the drafter asked began, and nodes of it"""


class Drafter(Protocol):
    """What the requests of a run share. It is called from one thread, in the order of the scheduler's actions."""

    features: bool
    """it reads the target's last hidden rows behind the final norm, from which lm_head makes logits, as its features"""
    layers: tuple[int, ...] = ()
    """what enters these layers of the target, side by side, are its features instead: they come by `learn`, a while after a commit"""

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> Session:
        """Read the prompt. `noise` couples the ranking to the target's; None: do not.

        features: [prompt_length - 1, hidden], the target's at all tokens of the prompt but the last, which is the first
        root; None if not wanted."""

    def propose(self, asks: Asks) -> list[Drafted]:
        """For each of different sessions, children for each node that it can go on from, in one forward.

        A node's parent was proposed to before, or is committed."""


@dataclass(frozen=True)
class Lineage:
    """The newest known token, which is the tree's root, and the last committed node above it."""

    anchor: int
    root: int
    token: int

    def path(self, commit: Commit) -> list[DraftNode]:
        """The committed nodes with their parents and tokens: the old root first, each the child of the one before."""
        tokens = (self.token, *commit.tokens[:-1])
        parents = (self.anchor, *commit.path[:-1])
        return [DraftNode(*node) for node in zip(commit.path, parents, tokens, strict=True)]

    def after(self, commit: Commit) -> Lineage:
        return Lineage(commit.path[-1], commit.root, commit.tokens[-1])

    @classmethod
    def of(cls, request: Request) -> Lineage:
        return cls(-1, 0, request.prompt[-1])


def best(
    logq: Tensor, positions: Sequence[int], noise: Noise | None, names: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The candidates for these positions, best first: tokens [n, KEPT], their z [n, KEPT, 1] and whether there is noise in it.

    logq: [n, vocabulary], a drafter's log-probabilities; names: int64 [vocabulary], what the target calls its tokens (None: the
    same). Both on the CPU."""
    known = slice(logq.shape[1]) if names is None else names
    z = logq if noise is None else logq + torch.stack([noise(p)[known] for p in positions])
    values, found = z.topk(min(KEPT, logq.shape[1]))
    tokens = found if names is None else names[found]
    return tokens.numpy(), values.double()[..., None].numpy(), noise is not None
