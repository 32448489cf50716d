"""A small language model as drafter, with a tree cache of its own that lives as long as the request.

It is a pipeline of one stage: the same books (core/stage.py) and the same cache as the target's. What is drafted
and still alive stays in the cache; a forward computes the frontier only, and the committed tokens that the drafter
itself had not expected: these are text, no tree, and after a pause there may be many of them.
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
        self._missing: list[int] = []  # the text's last tokens, as far as they have no row here yet
        self._version = 0

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        nodes = [
            nodes[k]
            for k in self._sequence.state.worth([n.id for n in nodes], [n.parent for n in nodes])
        ]
        if not nodes:
            return Drafted.pack((), ())
        positions, rows = self._forward(nodes)
        logits = self._head(rows)[:, : self._vocabulary].float()
        logq = torch.log_softmax(logits / self._temperature, -1).cpu()
        candidates = best(logq, (positions + 1).tolist(), self._noise)
        return Drafted(tuple(n.id for n in nodes), *candidates, np.full(len(nodes), COVERAGE))

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        path = self._lineage.path(commit)
        held = [n for n in path if n.id in self._sequence.state.row]
        self._missing += [n.token for n in path[len(held) :]]
        self._lineage = self._lineage.after(commit)
        self._version += 1
        self._sequence.prune(Prune(self._version, held[-1].id if held else -1, commit.root))

    def _forward(self, nodes: Sequence[DraftNode]) -> tuple[np.ndarray, Tensor]:
        """The text's tokens that have no row yet, in chunks, and behind the last of them the nodes: their positions and features."""
        *before, text = self._tokens(self._missing).split(PREFILL_ROWS)
        for chunk in before:
            self._sequence.prefill(chunk)
        self._missing = []
        rows = torch.cat([text, self._tokens([n.token for n in nodes])])
        at = self._sequence.state.context
        positions, features = self._sequence.extend_and_verify(
            rows, at, [n.id for n in nodes], [n.parent for n in nodes]
        )
        return positions[len(text) :], features[len(text) :]

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long).clamp(max=self._last_token)
