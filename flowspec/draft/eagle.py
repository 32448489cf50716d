"""An EAGLE-1/2 head as drafter (models/eagle.py), with a tree cache that lives as long as the request.

A node's row is its token beside the feature before it: the target's own where the parent is text, else what this head
predicted at the parent. Committed tokens end up with rows made of the target's features: they are computed (again) in the next forward,
in front of the frontier. What is below the root keeps what was predicted for it; that ages slowly (POLICY section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode, Prune
from flowspec.core.request import Request
from flowspec.draft.base import COVERAGE, Lineage, Noise, best
from flowspec.models import stage
from flowspec.models.eagle import EagleHead

PREFILL_ROWS = 256


class EagleDrafter:
    features = True

    def __init__(self, eagle: EagleHead, head: stage.Head):
        self._eagle, self._head = eagle, head

    @torch.inference_mode()
    def begin(self, request: Request, noise: Noise | None, features: Tensor | None = None) -> None:
        """The first token has no feature before it, so it has no row; a prompt of that token alone begins with zeros."""
        self._temperature = request.sampling.temperature or 1.0
        self._noise = noise
        self._sequence = stage.Sequence(self._eagle.layer)
        self._lineage = Lineage.of(request)
        known = self._eagle.place(torch.zeros(1, self._eagle.hidden) if features is None else features)
        tokens = torch.tensor(request.prompt[1:-1], dtype=torch.long)
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            self._sequence.prefill(self._eagle.rows(tokens[part], known[:-1][part]))
        self._ahead = request.prompt_length - len(tokens)  # a row's candidates stand so many positions behind it
        self._anchor = known[-1]  # the target's feature [hidden] at the token before the root
        self._predicted: dict[int, Tensor] = {}  # node with a row -> the feature [hidden] predicted at it
        self._missing: list[tuple[int, Tensor]] = []  # committed tokens without a row, and the target's features before them
        self._exact = False  # the root's row was made of the target's feature
        self._version = 0

    @torch.inference_mode()
    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        worth = self._sequence.state.worth([n.id for n in nodes], [n.parent for n in nodes])
        nodes = [nodes[k] for k in worth]
        if not nodes:
            return Drafted.pack((), ())
        ids, skip = [n.id for n in nodes], len(self._missing)
        tokens = [token for token, _ in self._missing] + [n.token for n in nodes]
        before = [feature for _, feature in self._missing] + [self._before(n) for n in nodes]
        rows = self._eagle.rows(torch.tensor(tokens), torch.stack(before))
        positions, predicted = self._sequence.extend_and_verify(rows[:skip], ids, [n.parent for n in nodes], rows[skip:])
        self._missing = []
        self._exact = self._exact or self._lineage.root in ids
        self._predicted.update(zip(ids, predicted, strict=True))
        logq = torch.log_softmax(self._head(predicted).float() / self._temperature, -1).cpu()
        candidates = best(logq, (positions + self._ahead).tolist(), self._noise)
        return Drafted(tuple(ids), *candidates, np.full(len(ids), COVERAGE))

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        assert features is not None, "an EAGLE drafter reads the target's features"
        path, known = self._lineage.path(commit), self._eagle.place(features)
        before = [self._anchor, *known[:-1]]
        stays = int(self._exact)  # the old root's row
        self._missing += [(node.token, feature) for node, feature in zip(path, before, strict=True)][stays:]
        self._anchor, self._exact = known[-1], False
        self._lineage = self._lineage.after(commit)
        self._version += 1
        self._sequence.prune(Prune(self._version, path[0].id if stays else -1, commit.root))
        self._predicted = {id: feature for id, feature in self._predicted.items() if id in self._sequence.state.row}

    def _before(self, node: DraftNode) -> Tensor:
        """The feature [hidden] of the token before this node."""
        return self._anchor if node.parent == self._lineage.anchor else self._predicted[node.parent]
