"""The lm drafter is a small language model with a tree cache of its own for each request.

A forward computes the frontier (draft/rows.py) and the committed tokens that the drafter itself had
not expected. These are text, not tree, and after a pause there may be many of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowspec.core.messages import Commit, DraftNode
from flowspec.core.request import Request
from flowspec.draft.base import Noise
from flowspec.draft.rows import PREFILL_ROWS, RowsDrafter, RowsSession
from flowspec.models import stage


class LmSession(RowsSession):
    """An LmSession is one request in the draft model."""

    def __init__(self, model: stage.StageModel, request: Request, noise: Noise | None):
        super().__init__(model, request, noise)
        self._last_token = model.config.vocab_size - 1
        self._missing: list[int] = []  # the text's last tokens that have no row here yet
        prompt = self._tokens(request.prompt[:-1])
        for chunk in prompt.split(PREFILL_ROWS) if len(prompt) else ():
            self._sequence.prefill(chunk)

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        path, held = self._follow(commit)
        self._missing += [n.token for n in path[held:]]

    def ask(self, nodes: Sequence[DraftNode]) -> stage.DraftRows:
        """Return the text's tokens that have no row yet, and the nodes behind the last of them.

        If they are more than one chunk, the chunks before the last are prefilled here."""
        *before, text = self._tokens(self._missing).split(PREFILL_ROWS)
        for chunk in before:
            self._sequence.prefill(chunk)
        self._missing = []
        rows = torch.cat([text, self._tokens([n.token for n in nodes])])
        at = self._sequence.state.context
        return stage.DraftRows(
            self._sequence, rows, at, [n.id for n in nodes], [n.parent for n in nodes]
        )

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        """Return the tokens, int64; one that only the target has becomes the draft model's last.

        The two vocabularies may be padded differently."""
        return torch.tensor(tokens, dtype=torch.long).clamp(max=self._last_token)


class LmDrafter(RowsDrafter):
    features = False

    def __init__(self, model: stage.StageModel, head: stage.Head, vocabulary: int):
        self._model, self._head = model, head
        self._vocabulary = min(vocabulary, head.vocabulary)

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> LmSession:
        return LmSession(self._model, request, noise)

    def logits(self, features: Tensor) -> Tensor:
        return self._head(features)[:, : self._vocabulary]
