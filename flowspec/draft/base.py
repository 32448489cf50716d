"""What a drafter is, and how one is chosen. A drafter only guesses: nothing it does can change the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode
from flowspec.core.request import Request

Noise = Callable[[int], Tensor]
"""position -> the target's keyed Gumbel noise, float64 [vocabulary]"""


class Drafter(Protocol):
    """One request at a time; called from one thread, in the order of the scheduler's actions."""

    def begin(self, request: Request, noise: Noise | None) -> None:
        """Forget the last request and read the prompt. `noise` couples the ranking to the target's; None: do not."""

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        """Children for each node that it can go on from. A node's parent was proposed to before, or is committed."""

    def commit(self, commit: Commit) -> None:
        """These tokens are text now, and only what is below `commit.root` lives on."""


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
