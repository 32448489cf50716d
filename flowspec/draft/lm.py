"""A small language model as drafter, with a tree cache of its own that lives as long as the request.

It is a pipeline of one stage: the same books (core/stage.py) and the same cache as the target's. What is drafted
and still alive stays in the cache; a forward computes the frontier only, and the committed tokens that the drafter
itself had not expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode, Prune
from flowspec.core.request import Request
from flowspec.draft.base import COVERAGE, Drafter, Lineage, Noise, best
from flowspec.models import stage

PREFILL_ROWS = 256


class LmDrafter(Drafter):
    features = False

    def __init__(self, model: stage.StageModel, head: stage.Head, vocabulary: int):
        self._model, self._head = model, head
        # the two may be padded differently: a token that only the target has is drafted from as the last one here
        self._vocabulary = min(vocabulary, head.vocabulary)
        self._last_token = model.config.vocab_size - 1

    def begin(self, request: Request, noise: Noise | None, features: Tensor | None = None) -> None:
        self._temperature = request.sampling.temperature or 1.0
        self._noise = noise
        self._sequence = stage.Sequence(self._model)
        prompt = self._tokens(request.prompt[:-1])
        for chunk in prompt.split(PREFILL_ROWS) if len(prompt) else ():
            self._sequence.prefill(chunk)
        self._lineage = Lineage.of(request)
        self._missing: list[DraftNode] = []  # committed tokens that hold no row here yet
        self._version = 0

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        batch = [*self._missing, *nodes]
        tokens = self._tokens([n.token for n in batch])
        kept, positions, rows = self._sequence.verify([n.id for n in batch], [n.parent for n in batch], tokens)
        assert rows is not None, "nobody abandons a draft"
        skip, self._missing = len(self._missing), []
        wanted = [row for row, k in enumerate(kept) if k >= skip]
        if not wanted:
            return Drafted.pack((), ())
        logits = self._head(rows[wanted])[:, : self._vocabulary].float()
        logq = torch.log_softmax(logits / self._temperature, -1).cpu()
        candidates = best(logq, (positions[wanted] + 1).tolist(), self._noise)
        return Drafted(tuple(nodes[kept[row] - skip].id for row in wanted), *candidates, np.full(len(wanted), COVERAGE))

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        path = self._lineage.path(commit)
        held = [n for n in path if n.id in self._sequence.state.row]
        self._missing += path[len(held) :]
        self._lineage = self._lineage.after(commit)
        self._version += 1
        anchor = held[-1].id if held else -1
        root = self._missing[0].id if self._missing else commit.root
        self._sequence.prune(Prune(self._version, anchor, root))

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long).clamp(max=self._last_token)
