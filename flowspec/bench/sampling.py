"""Decoding alone against speculative decoding in one process, and the target as its own draft."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.table import Table

from flowspec.core.request import Request
from flowspec.host.speculative import Pair

SIDES = {"ar": None, "speculative": "draft", "the target drafts": "target"}
"""This maps a row of the table to what guesses."""
SANE = "the target drafts"
"""No guess of this side may be rejected: both distributions are the same."""


class Run(NamedTuple):
    """A run is one text."""

    side: str
    run: int
    seconds: float
    new_tokens: int
    target_forwards: int
    rejected: int
    """So many drafts had a guess that was rejected."""


def measure(pair: Pair, requests: Sequence[Request]) -> Iterator[Run]:
    """Yield the runs of each side over each request, which take turns in a shuffled order.

    The first request warms up and does not count."""
    for k, request in enumerate(requests):
        for side in random.Random(k).sample([*SIDES], len(SIDES)):
            run = _run(pair, request, side, k)
            assert side != SANE or not run.rejected, "a guess of the target itself was rejected"
            if k:
                yield run


def _run(pair: Pair, request: Request, side: str, k: int) -> Run:
    begun = time.perf_counter()
    made = pair.begin(request, SIDES[side])
    written = [token for block in made.blocks for token in block]
    seconds = time.perf_counter() - begun
    rejected = sum(token.origin == "resampled" for token in written)
    return Run(side, k, seconds, len(written), made.forwards()["target_forwards"], rejected)


def table(runs: Sequence[Run], title: str) -> Table:
    """Return the mean time of a text with its standard deviation, and what follows from it."""
    shown = Table(title=title)
    for name in ("", "s a text, +/- std", "tokens/s", "speed-up", "pairs", "tokens a forward"):
        shown.add_column(name, justify="left" if not name else "right")
    seconds = {side: [run.seconds for run in runs if run.side == side] for side in SIDES}
    alone = seconds["ar"]
    for side, own in seconds.items():
        mine = [run for run in runs if run.side == side]
        tokens = sum(run.new_tokens for run in mine)
        ratios = [a / b for a, b in zip(alone, own, strict=True)]
        shown.add_row(
            side,
            f"{statistics.mean(own):.3f} +/- {statistics.pstdev(own):.3f}",
            f"{tokens / sum(own):.1f}",
            f"{sum(alone) / sum(own):.2f}x",
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})",
            f"{tokens / sum(run.target_forwards for run in mine):.2f}",
        )
    return shown
