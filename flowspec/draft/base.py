"""This module says what a drafter is and picks its candidates.

A drafter only guesses: nothing it does can change the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import KEPT, Commit, Drafted, DraftNode
from flowspec.core.past import adjust, past_of
from flowspec.core.request import Request
from flowspec.models.device import on_host

Noise = Callable[[int], Tensor]
"""A noise maps a position to the target's keyed Gumbel noise, float64 [vocabulary]."""
COVERAGE = 0.97
"""The target's choice is among a drafter's candidates this often."""


class Session(Protocol):
    """A session is one request in a drafter."""

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        """Take in that these tokens are text now and only what is below `commit.root` lives on.

        `features` [len(commit.path), hidden] are the target's at these nodes; None if the drafter
        does not read them, or if they come by `learn`."""

    def learn(self, features: Tensor) -> None:
        """Take in the target's features [n, width] at the next tokens of the text, in its order."""
        return None

    def end(self) -> None:
        """The request is over."""
        return None


Asks = Sequence[tuple[Any, Sequence[DraftNode]]]
"""These are pairs of a session, which the drafter that is asked has begun, and nodes of it."""


class Drafter(Protocol):
    """A drafter is what the requests of a run share.

    It is called from one thread, in the order of the scheduler's actions."""

    features: bool
    """The drafter reads the target's last hidden rows as its features. They are behind the final
    norm; lm_head makes logits from them."""
    lap: float = 0.0
    """A token without speculation takes so many seconds, as far as is known."""
    layers: tuple[int, ...] = ()
    """The inputs of these target layers, side by side, are the drafter's features instead. They
    come by `learn`, a while after a commit."""

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> Session:
        """Read the prompt and return the request's session.

        `noise` couples the ranking to the target's; None means that it is not coupled. `features`
        [prompt_length - 1, hidden] are the target's at all tokens of the prompt but the last, which
        is the first root; None if the drafter does not read them."""

    def propose(self, asks: Asks) -> list[Drafted]:
        """Return children for each node that can be gone on from, in one forward for all sessions.

        There is one answer a session, and no session is asked twice. A node's parent was proposed
        to before, or is committed."""


class RemoteSession(Session, Protocol):
    """A remote session is one request in a drafter that computes elsewhere."""

    def saw(self, nodes: Sequence[DraftNode]) -> None:
        """Take in nodes that only others are asked for; children of them may be asked for later."""


class Remote(Drafter, ABC):
    """A remote drafter computes on other ranks, while others compute here, and may be left out."""

    @abstractmethod
    def start(self, asks: Asks) -> Callable[[], tuple[list[Drafted], float]]:
        """Begin to do as `propose`; return what waits for the answers, and says after how many
        seconds they were there."""


@dataclass(frozen=True)
class Lineage:
    """A lineage is the newest known token, which is the tree's root, and the last node above it.

    The node above it is committed."""

    anchor: int
    root: int
    token: int

    def path(self, commit: Commit) -> list[DraftNode]:
        """Return the committed nodes with their parents and tokens.

        The old root is first; each further node is the child of the one before."""
        tokens = (self.token, *commit.tokens[:-1])
        parents = (self.anchor, *commit.path[:-1])
        return [DraftNode(*node) for node in zip(commit.path, parents, tokens, strict=True)]

    def after(self, commit: Commit) -> Lineage:
        return Lineage(commit.path[-1], commit.root, commit.tokens[-1])

    @classmethod
    def of(cls, request: Request) -> Lineage:
        return cls(-1, 0, request.prompt[-1])


class Alike:
    """Alike adjusts a draft model's logits as the target's are, by biases and penalties.

    A penalty counts the path of a node, so nodes and commits are told. It only improves guesses."""

    def __init__(self, request: Request):
        self._sampling = request.sampling
        self._past = past_of(request.sampling, request.prompt, request.known)
        self._root, self._position = 0, request.prompt_length - 1
        self._nodes: dict[int, DraftNode] = {}  # those that were asked for, by id

    def commit(self, path: Sequence[DraftNode], root: int) -> None:
        """Take in that these nodes are text now, and what the new root's id is."""
        self._reach(path)
        self._root, self._position = root, self._position + len(path)
        self._nodes = {id: node for id, node in self._nodes.items() if id >= root}

    def __call__(
        self, nodes: Sequence[DraftNode], logits: Tensor, names: Tensor | None = None
    ) -> Tensor:
        """Return the logits [n, vocabulary] after these nodes, adjusted.

        `names` are as for `best`. Without biases and penalties they are as they were; otherwise
        they are float64 on the host."""
        if not self._sampling.adjusts:
            return logits
        self._nodes.update((node.id, node) for node in nodes)
        rows = []
        for node, row in zip(nodes, on_host(logits), strict=True):
            self._reach(self._path(node))
            rows.append(self._adjusted(row, names))
        return torch.from_numpy(np.stack(rows))

    def _path(self, node: DraftNode) -> list[DraftNode]:
        """Return the nodes from the root to this one; none if one of them was never asked for."""
        path = [node]
        while path[-1].id != self._root and path[-1].parent in self._nodes:
            path.append(self._nodes[path[-1].parent])
        return path[::-1] if path[-1].id == self._root else []

    def _reach(self, path: Sequence[DraftNode]) -> None:
        """Let the text end with these nodes, of which the first is the root."""
        if self._past is not None:
            self._past.cut(self._position)
            for position, node in enumerate(path, self._position):
                self._past.reach(position, node.token)

    def _adjusted(self, row: Tensor, names: Tensor | None) -> np.ndarray:
        if names is None:
            return adjust(row.numpy(), self._sampling, self._past)
        wide = row.new_full((int(names.max()) + 1,), -torch.inf)
        wide[names] = row
        return adjust(wide.numpy(), self._sampling, self._past)[names.numpy()]


def best(
    logq: Tensor, positions: Sequence[int], noise: Noise | None, names: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the candidates for these positions, best first.

    They are tokens [n, KEPT], their z [n, KEPT, 1] and whether z has the noise in it. `logq`
    [n, vocabulary] are a drafter's log-probabilities. `names` (int64 [vocabulary]) is what the
    target calls the drafter's tokens; None means that it calls them the same. Both are on the
    CPU."""
    known = slice(logq.shape[1]) if names is None else names
    z = logq if noise is None else logq + torch.stack([noise(p)[known] for p in positions])
    values, found = z.topk(min(KEPT, logq.shape[1]))
    tokens = found if names is None else names[found]
    return tokens.numpy(), values.double()[..., None].numpy(), noise is not None
