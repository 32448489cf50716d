"""Decoding alone against speculative decoding in one process, and the target as its own draft."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from flowspec.bench.rivals import asked
from flowspec.core.request import Request
from flowspec.host.speculative import Pair

SIDES = {"ar": None, "speculative": "draft", "the target drafts": "target"}
"""This maps a row of the table to what guesses."""
SANE = "the target drafts"
"""No guess of this side may be rejected: both distributions are the same (see `measure`)."""


class Run(NamedTuple):
    """A run is one text."""

    side: str
    run: int
    seconds: float
    new_tokens: int
    target_forwards: int
    rejected: int | None
    """So many drafts had a guess that was rejected; None if that is not known."""


Side = Callable[[Request], tuple[int, int, "int | None"]]
"""This writes a text and returns the last three facts of its run."""


def own(pair: Pair) -> dict[str, Side]:
    """Return our sides."""

    def side(drafter: str | None) -> Side:
        def write(request: Request) -> tuple[int, int, int]:
            made = pair.begin(request, drafter)
            written = [token for block in made.blocks for token in block]
            rejected = sum(token.origin == "resampled" for token in written)
            return len(written), made.forwards()["target_forwards"], rejected

        return write

    return {name: side(drafter) for name, drafter in SIDES.items()}


def transformers(target: Path, draft: Path, dtype: str) -> dict[str, Side]:
    """Return transformers' `generate` of the same pair, alone and with the draft as assistant."""
    from flowspec.bench.unsplit import answers
    from flowspec.models.unsplit import load_unsplit

    model, assistant = (
        load_unsplit(target, dtype, "--target"),
        load_unsplit(draft, dtype, "--draft"),
    )
    model.generation_config.eos_token_id = None  # a text is as long as asked
    answer = answers(model, assistant)

    def side(name: str) -> Side:
        def write(request: Request) -> tuple[int, int, None]:
            sampling = request.sampling
            found = answer(asked(name, request.prompt, sampling, sampling.max_new_tokens))
            return len(found["token_ids"]), found["facts"]["target_forwards"], None

        return write

    return {"transformers": side("transformers"), "transformers, assisted": side("assisted")}


def measure(
    sides: Mapping[str, Side], requests: Sequence[Request], exact: bool = True
) -> Iterator[Run]:
    """Yield the runs of each side over each request, which take turns in a shuffled order.

    The first request warms up and does not count. `exact` says that the target's logits of a row
    are the same to the bit whatever rows are beside it, so that SANE is held to be."""
    for k, request in enumerate(requests):
        for name in random.Random(k).sample([*sides], len(sides)):
            begun = time.perf_counter()
            facts = sides[name](request)
            run = Run(name, k, time.perf_counter() - begun, *facts)
            assert not exact or name != SANE or not run.rejected, (
                "a guess of the target itself was rejected"
            )
            if k:
                yield run


def table(runs: Sequence[Run], sides: Iterable[str], title: str) -> Table:
    """Return the mean time of a text with its standard deviation, and what follows from it."""
    shown = Table(title=title)
    for name in ("", "s a text, +/- std", "tokens/s", "speed-up", "pairs", "tokens a forward"):
        shown.add_column(name, justify="left" if not name else "right")
    alone = [run.seconds for run in runs if run.side == "ar"]
    for side in sides:
        mine = [run for run in runs if run.side == side]
        took, tokens = [run.seconds for run in mine], sum(run.new_tokens for run in mine)
        ratios = [a / b for a, b in zip(alone, took, strict=True)]
        shown.add_row(
            side,
            f"{statistics.mean(took):.3f} +/- {statistics.pstdev(took):.3f}",
            f"{tokens / sum(took):.1f}",
            f"{sum(alone) / sum(took):.2f}x",
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})",
            f"{tokens / sum(run.target_forwards for run in mine):.2f}",
        )
    return shown
