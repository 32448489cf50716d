"""This module holds what drafters share that compute rows of a tree with a model.

Their sessions have books and a cache, and one forward serves many sessions. Such a drafter is a
pipeline of one stage, with the same books (core/stage.py) and the same cache as the target's. What
is drafted and still alive stays in the cache; a forward computes only the frontier and those tokens
of the text that have no row yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode, Prune
from flowspec.core.request import Request
from flowspec.draft.base import COVERAGE, Alike, Asks, Drafter, Lineage, Noise, Session, best
from flowspec.models import stage

PREFILL_ROWS = 256


class RowsSession(Session, ABC):
    """A RowsSession is one request whose tree has rows in the drafter's model."""

    ahead = 1
    """A row's candidates stand so many positions behind the row."""

    def __init__(self, model: stage.StageModel, request: Request, noise: Noise | None):
        self.temperature = request.sampling.temperature or 1.0
        self.noise = noise
        self._sequence = stage.CachedText(model)
        self._lineage = Lineage.of(request)
        self.alike = Alike(request)
        self._version = 0

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the keys and values for which there is room."""
        return self._sequence.size

    def worth(self, nodes: Sequence[DraftNode]) -> list[DraftNode]:
        """Return those of the nodes that may still be needed."""
        state = self._sequence.state
        return [nodes[k] for k in state.worth([n.id for n in nodes], [n.parent for n in nodes])]

    @abstractmethod
    def ask(self, nodes: Sequence[DraftNode]) -> stage.DraftRows:
        """Return the rows of a forward: those of the text that are missing, then the nodes.

        The nodes are all worth it (see `worth`)."""

    def took(self, nodes: Sequence[DraftNode], features: Tensor) -> None:
        """Take in the features [m + n, hidden] of the forward that was asked for.

        They belong to m rows of the text and to the n nodes."""

    def _follow(self, commit: Commit) -> tuple[list[DraftNode], int]:
        """Move the books to a commit; return its nodes and how many of them have a row.

        Those that have one are the first."""
        path = self._lineage.path(commit)
        held = [n.id for n in path if n.id in self._sequence.state.row]
        self._lineage = self._lineage.after(commit)
        self.alike.commit(path, commit.root)
        self._version += 1
        self._sequence.prune(Prune(self._version, held[-1] if held else -1, commit.root))
        return path, len(held)


class RowsDrafter(Drafter, ABC):
    """A RowsDrafter is a drafter whose sessions are RowsSessions."""

    names: Tensor | None = None
    """The names (int64 [vocabulary]) are what the target calls the drafter's tokens; None means
    that it calls them the same."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of the model's features [n, hidden]."""

    @torch.inference_mode()
    def propose(self, asks: Asks) -> list[Drafted]:
        worth: list[tuple[RowsSession, list[DraftNode]]] = [
            (s, s.worth(nodes)) for s, nodes in asks
        ]
        busy = [(session, nodes) for session, nodes in worth if nodes]
        made = (
            stage.verify_together([session.ask(nodes) for session, nodes in busy]) if busy else []
        )
        for (session, nodes), (_, features) in zip(busy, made, strict=True):
            session.took(nodes, features)
        counts = [len(nodes) for _, nodes in busy]
        rows = [features[-n:] for n, (_, features) in zip(counts, made, strict=True)]
        logits = stage.split(self.logits(stage.joined(rows)).float(), counts) if busy else ()
        answers = iter(
            self._answer(session, nodes, positions[-len(nodes) :], own)
            for (session, nodes), (positions, _), own in zip(busy, made, logits, strict=True)
        )
        return [next(answers) if nodes else Drafted.pack((), ()) for _, nodes in worth]

    def _answer(
        self, session: RowsSession, nodes: list[DraftNode], positions: np.ndarray, logits: Tensor
    ) -> Drafted:
        logits = session.alike(nodes, logits, self.names)
        logq = torch.log_softmax(logits / session.temperature, -1).cpu()
        candidates = best(logq, (positions + session.ahead).tolist(), session.noise, self.names)
        return Drafted(tuple(n.id for n in nodes), *candidates, np.full(len(nodes), COVERAGE))
