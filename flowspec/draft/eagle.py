"""An EAGLE head as drafter (models/eagle.py), with a tree cache that lives as long as the request.

A node's row is its token beside the feature before it: the target's own where it is known, else what this head predicted at the
parent. What becomes text keeps its row until the target's feature before it is here: with the commit (EAGLE-1/2) or a while after
it (EAGLE-3). The row is then made anew of that feature, in front of the next forward. What is below the root keeps what was
predicted for it, unless it is proposed to again; that ages slowly (POLICY section 3).
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
from flowspec.models.eagle import EagleHead

PREFILL_ROWS = 256


class EagleDrafter(Drafter):
    def __init__(self, eagle: EagleHead):
        self._eagle = eagle
        self.features, self.layers = not eagle.layers, eagle.layers

    @torch.inference_mode()
    def begin(self, request: Request, noise: Noise | None, features: Tensor | None = None) -> None:
        """The first token has no feature before it, so it has no row; a prompt of that token alone begins with zeros."""
        self._temperature = request.sampling.temperature or 1.0
        self._noise = noise
        self._sequence = stage.Sequence(self._eagle.layer)
        self._lineage = Lineage.of(request)
        known = self._eagle.place(features)
        tokens = torch.tensor(request.prompt[1:-1], dtype=torch.long)
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            self._sequence.prefill(self._eagle.rows(tokens[part], known[:-1][part]))
        self._ahead = request.prompt_length - len(
            tokens
        )  # a row's candidates stand so many positions behind it
        self._settled = len(
            tokens
        )  # rows of the text that are made of the target's features: the first ones
        self._text: list[DraftNode] = []  # the text's nodes behind them
        self._truth = [
            known[-1]
        ]  # the target's features [hidden] before these and, when it is known, before the root
        self._predicted: dict[int, Tensor] = {}  # node -> the feature [hidden] predicted at it
        self._exact = False  # the root's row was made of the target's feature
        self._version = 0

    @torch.inference_mode()
    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        worth = self._sequence.state.worth([n.id for n in nodes], [n.parent for n in nodes])
        nodes = [nodes[k] for k in worth]
        if not nodes:
            return Drafted.pack((), ())
        while self._behind():
            self._forward([])
        positions, predicted = self._forward(nodes)
        ids = [n.id for n in nodes]
        self._exact = self._exact or (self._lineage.root in ids and bool(self._truth))
        logq = torch.log_softmax(
            self._eagle.logits(predicted).float() / self._temperature, -1
        ).cpu()
        candidates = best(logq, (positions + self._ahead).tolist(), self._noise, self._eagle.names)
        return Drafted(tuple(ids), *candidates, np.full(len(ids), COVERAGE))

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        path = self._lineage.path(commit)
        held = [n.id for n in path if n.id in self._sequence.state.row]
        self._text += path
        if self._exact:  # nothing else was in line
            del self._text[0], self._truth[0]
            self._settled += 1
        self._exact = False
        self._lineage = self._lineage.after(commit)
        self._version += 1
        self._sequence.prune(Prune(self._version, held[-1] if held else -1, commit.root))
        alive = {
            *self._sequence.state.row,
            self._lineage.anchor,
            *(i for n in self._text for i in (n.id, n.parent)),
        }
        self._predicted = {id: feature for id, feature in self._predicted.items() if id in alive}
        if features is not None:
            self.learn(features)

    def learn(self, features: Tensor) -> None:
        self._truth += self._eagle.place(features)

    # ---- forwards ----------------------------------------------------------------------------------
    @property
    def _due(self) -> int:
        """So many of the text's nodes in line can have their rows made of the target's features."""
        return min(len(self._text), len(self._truth))

    @property
    def _with_row(self) -> int:
        """So many of them have one, if only of a guess."""
        return self._sequence.state.context - self._settled

    def _behind(self) -> bool:
        """The text's last rows, or what is predicted at the last of them, must be there before the tree's can be computed."""
        known = len(self._truth) > len(self._text) or self._lineage.anchor in self._predicted
        return max(self._due, self._with_row) < len(self._text) or not known

    def _forward(self, nodes: Sequence[DraftNode]) -> tuple[np.ndarray, Tensor]:
        """Rows of the text that are due, or else (without nodes) the next one that is missing, made of a guess; behind them the nodes.

        The nodes' positions [n] and predicted features [n, hidden]."""
        due, missing = self._due, self._with_row
        text = self._text[:due] if due or nodes else [self._text[missing]]
        before = self._truth[:due] + [self._before(n) for n in [*text[due:], *nodes]]
        rows = self._eagle.rows(
            torch.tensor([n.token for n in [*text, *nodes]]), torch.stack(before)
        )
        at = self._settled + (0 if due or nodes else missing)
        positions, predicted = self._sequence.extend_and_verify(
            rows, at, [n.id for n in nodes], [n.parent for n in nodes]
        )
        self._predicted.update(zip((n.id for n in [*text, *nodes]), predicted, strict=True))
        self._settled += due
        del self._text[:due], self._truth[:due]
        return positions[len(text) :], predicted[len(text) :]

    def _before(self, node: DraftNode) -> Tensor:
        """The feature [hidden] of the token before this node."""
        known = node.parent == self._lineage.anchor and len(self._truth) > len(self._text)
        return self._truth[-1] if known else self._predicted[node.parent]
