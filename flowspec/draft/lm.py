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
from flowspec.draft.base import Lineage, Noise
from flowspec.models import stage

PREFILL_ROWS = 256
COVERAGE = 0.97
"""how often the target's choice is among the candidates kept"""


class LmDrafter:
    KEPT = 20
    """candidates kept for a node"""

    def __init__(self, model: stage.StageModel, head: stage.Head, vocabulary: int):
        self._model, self._head = model, head
        # the two may be padded differently: a token that only the target has is drafted from as the last one here
        self._vocabulary = min(vocabulary, head.vocabulary)
        self._last_token = model.config.vocab_size - 1

    def begin(self, request: Request, noise: Noise | None) -> None:
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
        kept, positions, features = self._sequence.verify([n.id for n in batch], [n.parent for n in batch], tokens)
        skip, self._missing = len(self._missing), []
        wanted = [row for row, k in enumerate(kept) if k >= skip]
        if not wanted:
            return Drafted.pack((), ())
        logits = self._head(features[wanted])[:, : self._vocabulary].float()
        best = self._best(torch.log_softmax(logits / self._temperature, -1).cpu(), (positions[wanted] + 1).tolist())
        return Drafted(tuple(nodes[kept[row] - skip].id for row in wanted), *best, np.full(len(wanted), COVERAGE))

    def commit(self, commit: Commit) -> None:
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

    def _best(self, logq: Tensor, positions: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens, logq and noise [n, KEPT] of the kept candidates at these positions, best first by logq plus noise.

        logq: [n, vocabulary]."""
        kept = min(self.KEPT, logq.shape[1])
        if self._noise is None:
            values, tokens = logq.topk(kept)
            return tokens.numpy(), values.double().numpy(), None
        noise = torch.stack([self._noise(p)[: logq.shape[1]] for p in positions])
        tokens = (logq + noise).topk(kept).indices
        return tokens.numpy(), logq.gather(1, tokens).double().numpy(), noise.gather(1, tokens).numpy()
