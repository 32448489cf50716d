"""Estimates say how good and how fast a pair of models is; `flowspec estimate` writes them.

A file has a JSON object a line, whose `kind` is `acceptance` or `latency`; the fields below are its
others. Simulators read it. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from flowspec.errors import UserError, need
from flowspec.schema import build, choice

RULES = ("greedy", "coupled", "classic")


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """This is how often the target accepts a drafted token."""

    target: str
    """The target's folder, as it was given."""
    draft: str
    dtype: str
    """The dtype in which both models computed."""
    rule: str
    """`greedy`: the token of the highest logit of both is the same. `coupled`: so is the token that
    both pick with the same noise, as this project samples. `classic`: what the rule of Leviathan
    et al. (arXiv 2211.17192) accepts, sum min(p, q) over the vocabulary, in expectation."""
    temperature: float
    """Of both models; 0 is greedy."""
    seed: int
    """The text of the n-th prompt (from 0) has the noise of this seed + n."""
    max_new_tokens: int
    prompts: int
    acceptance: float
    """Accepted tokens / (accepted + rejected)."""
    low: float
    """From here to `high` is its interval of 95 % confidence, prompts being independent."""
    high: float
    worth: float
    """As many independent tokens would make the same interval."""
    accepted: float
    """Tokens of the target's texts that the draft model would have had accepted."""
    rejected: float
    censored: int | None = None
    """Runs of accepted tokens that a text's end cut off; null where tokens are expectations."""
    lengths: tuple[tuple[int, int | None, int, float], ...] | None = None
    """Of runs that ended with so many tokens (from, to; null: any more): how many, and how many a
    geometric distribution of this acceptance expects of those that came so far."""
    p_value: float | None = None
    """How often geometric runs would lie at least as far from what is expected; null where there is
    too little to compare. Near 0: tokens depend on each other, and runs are not geometric."""

    def __post_init__(self) -> None:
        choice("rule", self.rule, RULES)
        need(
            0 <= self.low <= self.acceptance <= self.high <= 1,
            f"acceptance is {self.acceptance} in {self.low}..{self.high}: these must lie in [0, 1] "
            "and in order",
        )


@dataclass(frozen=True, kw_only=True)
class Latency:
    """This is what a forward of each model took, with the choice of its token.

    The first is over the prompt, each further one over a token behind the cached ones. Numbers are
    medians in milliseconds, ranges from the 10th to the 90th percentile."""

    target: str
    draft: str
    dtype: str
    threads: int
    prompts: int
    prompt_tokens: float
    """The median length of the prompts."""
    max_new_tokens: int
    repeats: int
    target_first_ms: float
    target_first_range_ms: tuple[float, float]
    target_ms: float
    target_range_ms: tuple[float, float]
    draft_first_ms: float
    draft_first_range_ms: tuple[float, float]
    draft_ms: float
    draft_range_ms: tuple[float, float]

    def __post_init__(self) -> None:
        for name in ("target_first_ms", "target_ms", "draft_first_ms", "draft_ms"):
            value = getattr(self, name)
            need(0 < value < math.inf, f"{name} is {value}: it must be above 0")


KINDS: dict[str, type] = {"acceptance": Acceptance, "latency": Latency}


class Estimates(NamedTuple):
    """These are all estimates of a file, in order."""

    acceptances: tuple[Acceptance, ...]
    latencies: tuple[Latency, ...]


Files = Sequence[tuple[str, Estimates]]
"""These are files that were read: the path of each, and what it holds."""
One = TypeVar("One", Acceptance, Latency)


def the_acceptance(
    files: Files, rule: str | None = None, temperature: float | None = None
) -> tuple[str, Acceptance]:
    """Return the one estimate of this rule and temperature, and the path of its file.

    Where neither is given, greedy is preferred. Raise UserError unless there is exactly one."""

    def asked(one: Acceptance) -> bool:
        return rule in (None, one.rule) and temperature in (None, one.temperature)

    found = [(path, one) for path, held in files for one in held.acceptances]
    fit = [(path, one) for path, one in found if asked(one)]
    if rule is None and temperature is None and len(fit) > 1:
        fit = [(path, one) for path, one in fit if one.rule == "greedy"] or fit
    return _single("acceptance", files, found, fit, lambda one: f"{one.rule} {one.temperature:g}")


def the_latency(files: Files) -> tuple[str, Latency]:
    """Return the one estimate of latencies, and the path of its file.

    Raise UserError unless there is exactly one."""
    found = [(path, one) for path, held in files for one in held.latencies]
    return _single("latency", files, found, found, lambda one: f"{one.target} and {one.draft}")


def _single(
    kind: str,
    files: Files,
    found: list[tuple[str, One]],
    fit: list[tuple[str, One]],
    name: Callable[[One], str],
) -> tuple[str, One]:
    """Return the only one of `fit`; `found` are all of this kind."""
    if len(fit) == 1:
        return fit[0]
    where, names = ", ".join(path for path, _ in files), ", ".join(name(one) for _, one in found)
    need(bool(found), f"no {kind} in {where}: `flowspec estimate {kind} --json` writes it")
    how = "several fit" if fit else "none fits"
    raise UserError(f"of the {kind} estimates in {where} {how}: {names}")


def to_line(estimate: Acceptance | Latency) -> str:
    """Return the estimate as a line of a file, without its end."""
    kind = next(kind for kind, cls in KINDS.items() if isinstance(estimate, cls))
    return json.dumps({"kind": kind, **dataclasses.asdict(estimate)})


def load_estimates(path: str | os.PathLike[str]) -> Estimates:
    """Return what a file of estimates holds.

    Raise UserError, which names the file and the line, if it cannot be read or holds anything
    else."""
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    found = [_read(line, f"{path} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    need(bool(found), f"{path} holds no estimates: `flowspec estimate --json` writes them")
    return Estimates(
        tuple(one for one in found if isinstance(one, Acceptance)),
        tuple(one for one in found if isinstance(one, Latency)),
    )


def _read(line: str, where: str) -> Acceptance | Latency:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    need(isinstance(values, dict), f"{where} is no JSON object as `flowspec estimate` writes it")
    try:
        choice("kind", kind := values.pop("kind", None), tuple(KINDS))
        return build(KINDS[kind], values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
