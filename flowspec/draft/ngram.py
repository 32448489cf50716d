"""Prompt look-up proposes the tokens that followed the last few tokens earlier in the text.

The text is the prompt and the output so far. The look-up costs nothing and needs no model (Saxena
2023, "prompt lookup decoding"). The longest match wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode, Proposal
from flowspec.core.request import Request
from flowspec.draft.base import Asks, Drafter, Lineage, Noise, Session


class NgramSession(Session):
    """An NgramSession holds a request's text so far and the ends of the paths that are alive."""

    LENGTHS: ClassVar = {4: 0.7, 3: 0.6, 2: 0.45, 1: 0.25}
    """This maps a match's length in tokens to how often its prediction is taken to be right."""
    KEPT = 3
    """So many different continuations of a match are remembered, the newest first."""

    def __init__(self, request: Request):
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in request.prompt:
            self._append(token)
        self._lineage = Lineage.of(request)
        # live node -> the last tokens up to it, parents before children
        self._ending = {0: self._last_tokens()}
        self._parent: dict[int, int] = {}

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        """Return children for each node that the look-up can go on from."""
        return Drafted.pack([node.id for node in nodes], [self._continue(node) for node in nodes])

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        for token in commit.tokens:
            self._append(token)
        self._lineage = self._lineage.after(commit)
        live = {commit.root}
        live.update(id for id in self._ending if self._parent.get(id) in live)
        self._parent = {id: self._parent[id] for id in live if id in self._parent}
        self._ending = {
            commit.root: self._last_tokens(),
            **{id: ending for id, ending in self._ending.items() if id in live},
        }

    def _append(self, token: int) -> None:
        for n in self.LENGTHS:
            if len(self._text) >= n:
                followers = self._followers.setdefault(tuple(self._text[-n:]), [])
                if token in followers:
                    followers.remove(token)
                followers.insert(0, token)
                del followers[self.KEPT :]
        self._text.append(token)

    def _last_tokens(self) -> tuple[int, ...]:
        return tuple(self._text[-max(self.LENGTHS) :])

    def _continue(self, node: DraftNode) -> Proposal | None:
        if node.id not in self._ending:
            if node.parent not in self._ending:  # its branch is dead
                return None
            self._ending[node.id] = (*self._ending[node.parent], node.token)[-max(self.LENGTHS) :]
            self._parent[node.id] = node.parent
        ending = self._ending[node.id]
        for n, share in self.LENGTHS.items():
            followers = self._followers.get(ending[-n:]) if len(ending) >= n else None
            if followers:
                ranks = np.arange(len(followers))
                return Proposal(np.array(followers), np.log(0.5) * ranks, coverage=share)
        return None


class NgramDrafter(Drafter):
    features = False

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> NgramSession:
        return NgramSession(request)

    def propose(self, asks: Asks) -> list[Drafted]:
        return [session.propose(nodes) for session, nodes in asks]
