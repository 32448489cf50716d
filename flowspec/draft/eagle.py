"""The EAGLE drafter is a head (models/eagle.py) with a tree cache for each request.

The cache lives as long as the request. A node's row is made of its token and the feature before it:
the target's own where it is known, else what the head predicted at the parent. A node that becomes
text keeps its row until the target's feature before it is here: with the commit (EAGLE-1/2) or a
while after it (EAGLE-3). The row is then made anew of that feature, in front of the next forward. A
node below the root keeps what was predicted for it, unless it is proposed to again; that ages
slowly (docs/policy.md, section 3).
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
from flowspec.models.eagle import EagleHead


class EagleSession(RowsSession):
    """An EagleSession is one request in the head."""

    def __init__(
        self, eagle: EagleHead, request: Request, noise: Noise | None, features: Tensor | None
    ):
        """Read the prompt, with the target's features at all its tokens but the last.

        The first token has no feature before it, so it has no row. A prompt of that token alone
        begins with zeros."""
        super().__init__(eagle.layer, request, noise)
        self._eagle = eagle
        known = eagle.place(features)
        tokens = torch.tensor(request.prompt[1:-1], dtype=torch.long)
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            self._sequence.prefill(eagle.rows(tokens[part], known[:-1][part]))
        self.ahead = request.prompt_length - len(tokens)
        # so many of the text's rows, the first ones, are made of the target's features
        self._settled = len(tokens)
        self._text: list[DraftNode] = []  # the text's nodes behind those
        # the target's features [hidden] before these nodes and, when it is known, before the root
        self._truth = [known[-1]]
        self._predicted: dict[int, Tensor] = {}  # node -> the feature [hidden] predicted at it
        self._exact = False  # whether the root's row was made of the target's feature
        # the text's nodes in the forward that was asked for; so many are made of true features
        self._asked, self._due = list[DraftNode](), 0

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        path, _ = self._follow(commit)
        self._text += path
        if self._exact:  # then no other node was in line
            del self._text[0], self._truth[0]
            self._settled += 1
        self._exact = False
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

    # ---- forwards --------------------------------------------------------------------------------
    @property
    def _known(self) -> int:
        """Return how many of the text's nodes can have rows made of the target's features now."""
        return min(len(self._text), len(self._truth))

    @property
    def _with_row(self) -> int:
        """Return how many of the text's nodes have a row, if only one made of a guess."""
        return self._sequence.state.context - self._settled

    def _behind(self) -> bool:
        """Return whether the tree's rows have to wait for rows of the text.

        The text's last rows must be there first, and so must what is predicted at the last of them
        unless the target's feature is known."""
        known = len(self._truth) > len(self._text) or self._lineage.anchor in self._predicted
        return max(self._known, self._with_row) < len(self._text) or not known

    def ask(self, nodes: Sequence[DraftNode]) -> stage.DraftRows:
        """Compute what the nodes stand on; return the text's rows that are due, then the nodes."""
        while self._behind():
            ask = self._rows([])
            [(_, predicted)] = stage.verify_together([ask])
            self.took([], predicted)
        return self._rows(nodes)

    def _rows(self, nodes: Sequence[DraftNode]) -> stage.DraftRows:
        """Return the rows of the text that are due, and the nodes behind them.

        If none is due and there are no nodes, return the text's next missing row, made of a
        guess."""
        due, missing = self._known, self._with_row
        text = self._text[:due] if due or nodes else [self._text[missing]]
        before = self._truth[:due] + [self._before(n) for n in [*text[due:], *nodes]]
        rows = self._eagle.rows(
            torch.tensor([n.token for n in [*text, *nodes]]), torch.stack(before)
        )
        at = self._settled + (0 if due or nodes else missing)
        self._asked, self._due = text, due
        return stage.DraftRows(
            self._sequence, rows, at, [n.id for n in nodes], [n.parent for n in nodes]
        )

    def took(self, nodes: Sequence[DraftNode], features: Tensor) -> None:
        self._predicted.update(zip((n.id for n in [*self._asked, *nodes]), features, strict=True))
        self._settled += self._due
        del self._text[: self._due], self._truth[: self._due]
        asked = any(node.id == self._lineage.root for node in nodes)
        self._exact = self._exact or (asked and bool(self._truth))

    def _before(self, node: DraftNode) -> Tensor:
        """Return the feature [hidden] of the token before this node."""
        known = node.parent == self._lineage.anchor and len(self._truth) > len(self._text)
        return self._truth[-1] if known else self._predicted[node.parent]


class EagleDrafter(RowsDrafter):
    def __init__(self, eagle: EagleHead):
        self._eagle = eagle
        self.features, self.layers = not eagle.layers, eagle.layers
        self.names = eagle.names

    @torch.inference_mode()
    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> EagleSession:
        return EagleSession(self._eagle, request, noise, features)

    def logits(self, features: Tensor) -> Tensor:
        return self._eagle.logits(features)
