"""Here texts are compared: are they the same, and if not, is that a numeric tie or a bug?

There are two comparisons. The ring is compared with itself: the configured method with plain
decoding. This does not see what is wrong in both (a wrong split, a damaged weight). And the ring is
compared with the unsplit model (`Reference`): transformers computes prompt and text in one forward,
and at each position our `pick` with the same seed must give the token that the ring gave, by the
same lead.

Sums of numbers depend on their order, so logits of forwards of different shapes differ in the last
digits. `tolerance` says how far that can go. A choice that another one could have replaced within
it is a tie; anything else is a bug. `distance` measures how far away the other choice was: from the
best score, and from the borders of top-k, top-p and min-p, beyond which it is not kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core.past import past_of
from flowspec.core.request import Sampling
from flowspec.engine import Engine
from flowspec.errors import need
from flowspec.generation import Token
from flowspec.models.unsplit import load_unsplit
from flowspec.sampling import NoiseRows, adjusted, noise_for, pick

ROWS = 64
"""At most this many rows of logits are held at a time."""
LANES, MARGIN = 16, 6.0
USUAL = 10.0
"""This stands for a row's largest logit where that is not known: the demo target's is 9.9 at the
median and 16.7 at most."""


# ---- how far two computations of the same logits may lie apart -----------------------------------
def tolerance(dtype: str, layers: int, hidden: int, largest: float = USUAL) -> float:
    """Return how far forwards of different shapes can differ in the difference of two logits.

    `largest` is the largest of the row's logits.

    2 L + 1 sums (two in each of L layers, and the head) add an error of their own each, in
    directions of their own: sqrt(2 L + 1). Each error has two parts. Storing the result has the
    dtype's unit roundoff. Adding `hidden` products in float32 in LANES partial sums has sqrt(hidden
    / LANES) times the unit roundoff of float32. What such a share of the row of features is worth
    in a logit is proportional to the logits' size.

    MARGIN is for the rest. It was measured on the demo target (625 rows, a row a forward against
    all rows in one, the 20 likeliest tokens of each): the largest difference was 1.3 times the
    bound without it in float32, 1.3 in bfloat16 and 1.8 in float16, and the median 0.4, 0.4 and
    0.5. A small target of random weights, whose layers rounded otherwise than transformers',
    reached 4.1: rows can be sensitive."""
    stored = getattr(torch, dtype)
    stored = (
        stored if stored.is_floating_point else torch.float32
    )  # with int8 weights, all that is computed is float32
    rounding = (
        torch.finfo(stored).eps + torch.finfo(torch.float32).eps * math.sqrt(hidden / LANES)
    ) / 2
    return MARGIN * rounding * math.sqrt(2 * layers + 1) * largest


def tolerance_of(engine: Engine, largest: float = USUAL) -> float:
    """Return the tolerance of this ring."""
    return tolerance(
        engine.sums_in, engine.manifest.num_layers, engine.manifest.hidden_size, largest
    )


# ---- how far another choice was ------------------------------------------------------------------
def distance(
    logits: Tensor, sampling: Sampling, noise: NoiseRows | None, position: int, token: int
) -> float:
    """Return by how much logits [vocabulary] would have to shift for `token` to be picked.

    The shift is of logits against each other; it is 0 if `token` is picked. For it to be picked,
    the filters must keep it, and each token of a better score must fall behind it or be filtered
    out."""
    if noise is None:
        return float(logits.max() - logits[token])
    logp = torch.log_softmax(logits.double() / sampling.temperature, -1)
    scores, inside = logp + noise(position), margins(logp, sampling)
    rivals = torch.minimum(scores - scores[token], inside.clamp(min=0.0)).clamp(min=0.0)
    return sampling.temperature * max(float(rivals.max()), -float(inside[token]))


def margins(logp: Tensor, sampling: Sampling) -> Tensor:
    """Return how far each token is from the border of the filters, float64 [vocabulary].

    It is 0 or more for a token that is kept and negative for the others. It is the shift of one
    log-probability before filtering (`logp`) against the others that takes the token across."""
    inside = torch.full_like(logp, torch.inf)
    values, order = logp.sort(descending=True)
    kept = len(values)
    if 0 < sampling.top_k < len(values):
        kept = int((values >= values[sampling.top_k - 1]).sum())
        inside = _from_rank(logp, values, sampling.top_k)
    if sampling.top_p < 1:
        p = torch.softmax(values[:kept], -1)
        above = p.cumsum(-1) - p
        fit = int((above < sampling.top_p).sum())
        above = torch.cat([above, above.new_ones(len(values) - kept)]).clamp(0.0, 1.0)
        # a shift by x multiplies the odds of the mass above a token by e^x at most
        of_mass = torch.empty_like(logp).scatter_(
            0, order, math.log(sampling.top_p / (1 - sampling.top_p)) - torch.logit(above)
        )
        by_rank = _from_rank(logp, values, fit)
        inside = torch.minimum(
            inside,
            torch.where(
                by_rank >= 0, torch.minimum(of_mass, by_rank), torch.maximum(of_mass, by_rank)
            ),
        )
    if sampling.min_p > 0:
        inside = torch.minimum(inside, logp - values[0] - math.log(sampling.min_p))
    return inside


def _from_rank(logp: Tensor, values: Tensor, k: int) -> Tensor:
    """Return how far each token is above the best of those beyond the k likeliest.

    For a token that is not among the k likeliest, it is how far it is below the last of them
    (negative)."""
    beyond = values[k] if k < len(values) else -torch.inf
    return torch.where(logp >= values[k - 1], logp - beyond, logp - values[k - 1])


def lead_is_certain(
    logits: Tensor, sampling: Sampling, noise: NoiseRows | None, position: int, allowed: float
) -> bool:
    """Return whether filters leave the lead of the best token over the second as it is.

    That is so if no shift within `allowed` makes a filter keep or drop a token that matters for
    this lead."""
    if noise is None or not sampling.filters:
        return True
    logp, reach = (
        torch.log_softmax(logits.double() / sampling.temperature, -1),
        allowed / sampling.temperature,
    )
    scores, inside = logp + noise(position), margins(logp, sampling)
    second = scores.masked_fill(inside < 0, -torch.inf).topk(2).values[1]
    return not bool(((scores > second - reach) & (inside.abs() < reach)).any())


# ---- the unsplit model ---------------------------------------------------------------------------
class Reference:
    """The reference is the model that was split, whole, as transformers computes it."""

    def __init__(self, folder: Path, dtype: str, rounded: Sequence[str] = ()):
        """Load the model; this takes as much memory as the whole model in float32.

        Raise UserError if transformers cannot load it. `rounded` are the dtypes that the ring's
        weights were rounded to, one after the other; these weights are to be the same."""
        from transformers import __version__

        self._name = f"the unsplit model {folder} (transformers {__version__}, {dtype})"
        model = load_unsplit(folder, "float32", "--reference")
        for parameter in model.parameters():  # not the rotary frequencies
            for name in (*rounded, dtype):
                parameter.data = parameter.data.to(getattr(torch, name))
        self._model = model
        self._last: tuple[list[int], Tensor] | None = (
            None  # the latest tokens, and their rows behind the final norm
        )

    def __str__(self) -> str:
        return self._name

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], text: Sequence[int]) -> Iterator[Tensor]:
        """Yield the logits that each token of the text was picked from, float32 [vocabulary], in
        order."""
        ids = [*prompt, *text[:-1]]
        if self._last is None or self._last[0] != ids:  # two methods' texts are most often the same
            self._last = (
                ids,
                self._model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0],
            )
        for rows in self._last[1][len(prompt) - 1 :].split(ROWS):
            yield from self._model.get_output_embeddings()(rows).float()


class Doubt(NamedTuple):
    """A doubt is a token of the ring's text that the unsplit model did not pick, or not as
    clearly."""

    position: int
    ours: int
    """The ring picked this token."""
    theirs: int
    apart: float
    """This is how far the ring's token was from being picked (`distance`). If the two tokens are
    the same, it is how far the two leads lie apart."""
    allowed: float

    @property
    def tie(self) -> bool:
        return self.apart < self.allowed


@dataclasses.dataclass(frozen=True)
class Replay:
    """A replay is what the unsplit model says to a text of the ring."""

    tokens: int
    doubts: list[Doubt]
    worst: float
    """Two leads of the same token lay apart by at most this share of what rounding may do."""

    @property
    def bugs(self) -> list[Doubt]:
        return [doubt for doubt in self.doubts if not doubt.tie]

    @property
    def parted(self) -> bool:
        return bool(self.doubts)

    def verdict(self, engine: Engine) -> str:
        """Return the finding in words: of several doubts the first bug, or else the first tie."""
        if not self.doubts:
            return f"identical ({self.tokens} tokens)"
        first = (self.bugs or self.doubts)[0]
        ours, theirs = (_named(engine, token) for token in (first.ours, first.theirs))
        what = f"differs: {ours} by the ring, {theirs} by the model, {first.apart:.2e} apart"
        if first.ours == first.theirs:
            what = f"has another lead of {ours}, {first.apart:.2e} apart"
        kind = "a numeric tie" if first.tie else "a bug"
        more = f" (and {len(self.doubts) - 1} more)" if len(self.doubts) > 1 else ""
        return (
            f"position {first.position} {what} where rounding may do {first.allowed:.2e}, so "
            f"{kind}{more}"
        )


def replay(
    engine: Engine, reference: Reference, prompt: str, text: Sequence[Token], setting: dict
) -> Replay:
    """Return what the unsplit model picks at each position of a text, after the same tokens."""
    start, sampling = (
        engine.text.encode(prompt),
        dataclasses.replace(engine.config.sampling, **setting),
    )
    noise, doubts, worst = noise_for(sampling, engine.manifest.vocab_size), [], 0.0
    ids, past, times = [token.id for token in text], past_of(sampling, start), _times(sampling)
    rows, whole = reference.logits(start, ids), [*start, *ids]
    for position, (token, row) in enumerate(zip(text, rows, strict=True), len(start)):
        if past is not None:
            past.reach(position - 1, whole[position - 1])
        logits = adjusted(row, sampling, past)
        allowed = times * tolerance_of(engine, float(row.abs().max()))
        chosen = pick(logits, sampling, noise, position)
        if chosen.token != token.id:
            doubts.append(
                Doubt(
                    position,
                    token.id,
                    chosen.token,
                    distance(logits, sampling, noise, position, token.id),
                    allowed,
                )
            )
        elif math.isfinite(chosen.gap) and lead_is_certain(
            logits, sampling, noise, position, allowed
        ):
            apart = abs(chosen.gap - token.gap) * (sampling.temperature or 1.0)
            worst = max(worst, apart / allowed)
            if not apart < allowed:
                doubts.append(Doubt(position, token.id, token.id, apart, allowed))
    return Replay(len(text), doubts, worst)


def _times(sampling: Sampling) -> float:
    """Return how many times a logit's error may be what it was, once it is penalised."""
    return max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)


# ---- verify --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence is where two texts part.

    It holds the absolute position, the two tokens, and the lead of plain decoding's choice."""

    position: int
    speculative: int | None
    plain: int | None
    gap: float


class Count:
    """A count of texts that are identical, that part at a tie, and that part at a bug."""

    def __init__(self) -> None:
        self.all = self.ties = self.bugs = 0

    def add(self, parted: bool, bug: bool) -> None:
        self.all, self.ties, self.bugs = (
            self.all + 1,
            self.ties + (parted and not bug),
            self.bugs + bug,
        )

    def __str__(self) -> str:
        same = self.all - self.ties - self.bugs
        return (
            f"{same} of {self.all} identical, {self.ties} parted at a numeric tie, "
            f"{self.bugs} at a bug"
        )


def verify(
    engine: Engine,
    prompts: Sequence[str],
    settings: Sequence[dict],
    reference: Reference | None = None,
) -> bool:
    """Compare each prompt's text with that of plain decoding, at each sampling setting.

    With a reference, compare both also with the unsplit model. Print a line for each prompt and
    setting, and at the end what was compared. Return True if all texts are identical or part at a
    numeric tie only."""
    method = engine.config.method
    plain = method == "ar" and reference is None
    need(
        not plain,
        "verify compares a method with plain decoding: choose another method than ar, or give "
        "--reference DIR",
    )
    itself, unsplit, worst = Count(), Count(), 0.0
    for number, prompt in enumerate(prompts, 1):
        for setting in settings:
            texts = {
                name: list(engine.generate(prompt, method=name, **setting))
                for name in dict.fromkeys((method, "ar"))
            }
            found = parting(texts[method], texts["ar"], len(engine.text.encode(prompt)))
            replays = (
                {
                    name: replay(engine, reference, prompt, text, setting)
                    for name, text in texts.items()
                }
                if reference
                else {}
            )
            bug = found is not None and not may_be_a_tie(engine, found, replays.values())
            itself.add(found is not None, bug)
            said = [verdict(engine, found, len(texts["ar"]), not bug)] if method != "ar" else []
            for replayed in replays.values():
                unsplit.add(replayed.parted, bool(replayed.bugs))
                worst = max(worst, replayed.worst)
            words = {name: replayed.verdict(engine) for name, replayed in replays.items()}
            for each in dict.fromkeys(words.values()):  # of both texts most often the same
                said.append(
                    f"{', '.join(n for n in words if words[n] == each)} and the unsplit model: "
                    f"{each}"
                )
            print(f"prompt {number}, {describe(setting)}: {'; '.join(said)}", flush=True)
    if method != "ar":
        print(f"{method}: {itself}")
    print(f"{reference}: {unsplit}; {_leads(worst)}" if reference else _alone(itself))
    return itself.bugs + unsplit.bugs == 0


def _alone(itself: Count) -> str:
    """Return what verify has shown without a reference."""
    finding = "speculation changed the text" if itself.bugs else "speculation changes nothing"
    return (
        f"compared: the ring with itself: {finding}; give --reference DIR to compare with the "
        "unsplit model"
    )


def _leads(worst: float) -> str:
    return (
        f"where the token is the same, its lead differs by at most {worst:.0%} of what "
        "rounding may do"
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the first index at which two texts' token ids differ, or None if they are the same."""
    differs = (k for k, pair in enumerate(zip_longest(a, b)) if pair[0] != pair[1])
    return next(differs, None)


def parting(speculative: Sequence[Token], plain: Sequence[Token], start: int) -> Divergence | None:
    """Return where these continuations of `start` tokens part, or None."""
    at = first_difference([t.id for t in speculative], [t.id for t in plain])
    if at is None:
        return None
    ours, theirs = (text[at] if at < len(text) else None for text in (speculative, plain))
    gap = theirs.gap if theirs else math.inf
    return Divergence(start + at, ours and ours.id, theirs and theirs.id, gap)


def may_be_a_tie(engine: Engine, found: Divergence, replays: Collection[Replay]) -> bool:
    """Return whether rounding can explain where two texts part.

    The unsplit model judges where it was asked for both texts; otherwise the lead of plain decoding
    does."""
    if found.speculative is None or found.plain is None:  # one text ends where the other goes on
        return False
    return (
        not any(replayed.bugs for replayed in replays)
        if replays
        else found.gap < _times(engine.config.sampling) * tolerance_of(engine)
    )


def verdict(engine: Engine, found: Divergence | None, count: int, tie: bool) -> str:
    """Return the finding in words; `count` are the tokens of the text if the two are the same."""
    if found is None:
        return f"identical ({count} tokens)"
    a, b = (_named(engine, token) for token in (found.speculative, found.plain))
    kind = "a numeric tie" if tie else "a bug"
    return (
        f"differs at position {found.position}: {a} with speculation, {b} without; top-2 gap "
        f"{found.gap:.2e}, so {kind}"
    )


def _named(engine: Engine, token: int | None) -> str:
    return "nothing" if token is None else f"{token} {engine.text.decode([token])!r}"


def describe(setting: dict) -> str:
    return (
        "greedy"
        if setting["temperature"] == 0
        else ", ".join(f"{name} {value}" for name, value in setting.items())
    )
