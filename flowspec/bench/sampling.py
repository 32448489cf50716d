"""Methods of one process against decoding alone: what runs in which order, and its tables."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from flowspec.bench.rivals import asked
from flowspec.core.request import Request
from flowspec.host.decoding import Pair

SIDES = {"ar": None, "speculative": "draft", "the target drafts": "target"}
"""This maps a row of the table to what guesses."""
SANE = "the target drafts"
"""No guess of this side may be rejected: both distributions are the same (see `measure`)."""


class Facts(NamedTuple):
    """Facts are what is known of a text that was written."""

    new_tokens: int
    target_forwards: int
    rejected: int | None = None
    """So many drafts had a guess that was rejected; None if that is not known, as all below."""
    nodes: int | None = None
    """So many tokens were guessed."""
    height: int | None = None
    """The trees had so many levels, all together."""
    draft_seconds: float | None = None
    target_seconds: float | None = None
    """The forwards of each model took so long, with lm_head."""
    cache_mb: float | None = None
    """Both models' keys and values take so many MB (10^6 bytes) when the text is written."""


class Run(NamedTuple):
    """A run is one text."""

    side: str
    run: int
    seconds: float
    facts: Facts

    def record(self) -> dict[str, Any]:
        """Return a line of JSON's fields."""
        return {"side": self.side, "run": self.run, "seconds": self.seconds} | self.facts._asdict()


Side = Callable[[Request], Facts]
"""This writes a text."""


def written(pair: Pair, drafter: str | None) -> Side:
    """Return what writes a text with a pair, of which this one guesses."""

    def write(request: Request) -> Facts:
        begun = pair.begin([request], drafter)
        blocks = [*begun.blocks]
        readers = begun.readers
        return Facts(
            new_tokens=sum(len(block.written) for block in blocks),
            target_forwards=readers["target"].forwards,
            rejected=sum(token.origin == "resampled" for b in blocks for token in b.written),
            nodes=sum(block.nodes for block in blocks),
            height=sum(block.height for block in blocks),
            draft_seconds=readers["draft"].seconds if drafter else 0.0,
            target_seconds=readers["target"].seconds,
            cache_mb=sum(reader.cache_bytes for reader in readers.values()) / 1e6,
        )

    return write


def own(pair: Pair) -> dict[str, Side]:
    """Return the sides of a pair, by SIDES."""
    return {name: written(pair, drafter) for name, drafter in SIDES.items()}


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
        def write(request: Request) -> Facts:
            sampling = request.sampling
            found = answer(asked(name, request.prompt, sampling, sampling.max_new_tokens))
            return Facts(len(found["token_ids"]), found["facts"]["target_forwards"])

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
            run = Run(name, k, time.perf_counter() - begun, facts)
            assert not exact or name != SANE or not facts.rejected, (
                "a guess of the target itself was rejected"
            )
            if k:
                yield run


def table(runs: Sequence[Run], sides: Iterable[str], title: str) -> Table:
    """Return the mean time of a text with its standard deviation, and what follows from it."""
    shown = Table(title=title)
    for name in ("", "s a text, +/- std", "tokens/s", "speed-up", "pairs", "tokens a forward"):
        shown.add_column(name, justify="left" if not name else "right")
    for side in sides:
        took = [run.seconds for run in runs if run.side == side]
        shown.add_row(
            side,
            f"{statistics.mean(took):.3f} +/- {statistics.pstdev(took):.3f}",
            *_speed(runs, side),
            f"{_mean(runs, side, 'new_tokens'):.2f}",
        )
    return shown


def trees_table(runs: Sequence[Run], sides: Iterable[str], title: str) -> Table:
    """Return a row a side: what an iteration (a tree, a forward of the target) brings and takes."""
    caption = (
        "of a tree: tokens, nodes, levels, ms of draft and target; rate in tokens/s, cache in MB"
    )
    shown = Table(title=title, caption=caption, box=None, padding=(0, 0, 0, 1))
    shown.add_column("", no_wrap=True)
    names = ("tokens", "rate", "speed-up", "nodes", "levels", "draft", "target", "cache")
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for side in sides:
        rate, _, pairs = _speed(runs, side)
        shown.add_row(
            side,
            f"{_mean(runs, side, 'new_tokens'):.2f}",
            rate,
            pairs,
            *_trees(runs, side),
        )
    return shown


def _trees(runs: Sequence[Run], side: str) -> list[str]:
    """Return what is said of a side's trees; nothing if they are not known."""
    cache = [run.facts.cache_mb for run in runs if run.side == side and run.facts.cache_mb]
    if not cache:
        return []
    return [
        f"{_mean(runs, side, 'nodes'):.0f}",
        f"{_mean(runs, side, 'height'):.1f}",
        f"{1e3 * _mean(runs, side, 'draft_seconds'):.1f}",
        f"{1e3 * _mean(runs, side, 'target_seconds'):.1f}",
        f"{max(cache):.1f}",
    ]


def _mean(runs: Sequence[Run], side: str, fact: str) -> float:
    """Return how much of it there is in an iteration."""
    mine = [run.facts for run in runs if run.side == side]
    return sum(getattr(facts, fact) for facts in mine) / sum(f.target_forwards for f in mine)


def _speed(runs: Sequence[Run], side: str) -> tuple[str, str, str]:
    """Return tokens/s, how many times those of decoding alone they are, and that text by text.

    The last is the median and the spread."""
    mine = [run for run in runs if run.side == side]
    alone = {run.run: run.seconds for run in runs if run.side == "ar"}
    seconds, tokens = sum(run.seconds for run in mine), sum(run.facts.new_tokens for run in mine)
    ratios = [alone[run.run] / run.seconds for run in mine]
    return (
        f"{tokens / seconds:.1f}",
        f"{sum(alone.values()) / seconds:.2f}x",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})",
    )
