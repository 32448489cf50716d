"""A whole model in one process, and what it says of the rows of several texts' trees."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core.messages import DraftNode
from flowspec.core.request import Request
from flowspec.draft.lm import LmSession
from flowspec.models.device import on_host
from flowspec.models.logits import TreeLogits
from flowspec.models.placement import Placement
from flowspec.models.stage import Head, StageModel, load_whole, rehearse, verify_together


class Rows(NamedTuple):
    """Rows are those of some nodes of a text's tree."""

    session: LmSession
    nodes: Sequence[DraftNode]
    """Each is the root of the tree, or a child of one that had a row before or has one here."""


class Whole(NamedTuple):
    """A whole is a model, and as many of its logits as there are tokens."""

    model: StageModel
    head: Head
    vocabulary: int
    places: Sequence[str] = ()
    """The layers are there, in words, if they have a placement."""

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: str, vocabulary: int) -> Whole:
        """Load a checkpoint. Raise UserError, which names the file, if it cannot be computed."""
        model, head = load_whole(folder, dtype, device)
        rehearse(model, head)
        return cls(model, head, min(vocabulary, head.vocabulary))

    @classmethod
    def placed(
        cls, folder: Path, dtype: torch.dtype, placement: Placement, vocabulary: int
    ) -> Whole:
        """Load a checkpoint whose layers are somewhere else. Raise UserError as `load` does."""
        from flowspec.models.offload import load_placed

        model, head, places = load_placed(folder, dtype, placement)
        return cls(model, head, min(vocabulary, head.vocabulary), places)


class Reader:
    """A reader reads the rows of texts that are written together, and counts."""

    def __init__(self, whole: Whole):
        self._whole, self._sessions = whole, list[LmSession]()
        self.forwards, self.seconds = 0, 0.0
        """So many forwards were made of rows of trees, and took so many seconds, with lm_head."""

    def begin(self, request: Request) -> LmSession:
        """Read the prompt but for its last token, which is the first root of the text's tree."""
        self._sessions.append(LmSession(self._whole.model, request, None))
        return self._sessions[-1]

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the texts' keys and values."""
        return sum(session.cache_bytes for session in self._sessions)

    def read(self, asks: Sequence[Rows]) -> list[TreeLogits]:
        """Return the logits [vocabulary], float32, after each of the nodes of different texts.

        All rows go through the model in one forward."""
        begun = time.perf_counter()
        made = verify_together([session.ask(nodes) for session, nodes in asks])
        self.forwards += 1
        self.seconds += time.perf_counter() - begun
        return [
            TreeLogits(
                self._logits,
                [node.id for node in nodes],
                [node.parent for node in nodes],
                features[-len(nodes) :],
            )
            for (_, nodes), (_, features) in zip(asks, made, strict=True)
        ]

    def _logits(self, features: Tensor) -> Tensor:
        begun = time.perf_counter()
        logits = on_host(self._whole.head(features)[:, : self._whole.vocabulary].float())
        self.seconds += time.perf_counter() - begun
        return logits
