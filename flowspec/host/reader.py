"""A reader computes what a whole model makes of one text, which may be taken back and go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.draft.rows import PREFILL_ROWS
from flowspec.models.placement import Placement
from flowspec.models.stage import CachedText, Head, StageModel, load_whole, rehearse


class Whole(NamedTuple):
    """A whole model, and as many of its logits as there are tokens."""

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
    """A reader holds one text's rows in a model's cache."""

    def __init__(self, whole: Whole):
        self._whole, self._text = whole, CachedText(whole.model)
        self._last_token = whole.model.config.vocab_size - 1
        self.forwards = 0

    @property
    def length(self) -> int:
        """Return of how many tokens, the first of the text, there are rows."""
        return self._text.state.context

    def take_back(self, length: int) -> None:
        """Forget the tokens behind the first so many."""
        if length < self.length:
            self._text.cut(length)

    @torch.inference_mode()
    def logits(self, text: Sequence[int], n: int) -> Tensor:
        """Return the logits [n, vocabulary], float32, after each of the last n tokens of a text.

        The text goes on from the tokens of which there are rows; the last n have none yet."""
        # a token that only the other model has becomes this one's last
        rows = torch.tensor(text[self.length :], dtype=torch.long).clamp(max=self._last_token)
        parts = [self._text.prefill(chunk) for chunk in rows.split(PREFILL_ROWS)]
        self.forwards += 1
        return self._whole.head(torch.cat(parts)[-n:])[:, : self._whole.vocabulary].float().cpu()
