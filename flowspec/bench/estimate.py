"""A pair of unsplit models is measured here: how often the draft model is right, how fast both are.

These are two experiments of Timor et al. (arXiv 2405.14105), whose figures their simulation of
speculation parallelism takes. The target writes its text once. Then one forward of the draft model
over prompt and text gives its choice at each position, after the target's own tokens: that is what
it would have drafted there, as it begins again after each rejected token."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowspec.core.geometric import fit, lengths, p_value, runs
from flowspec.core.request import Sampling
from flowspec.estimates import Acceptance, Latency
from flowspec.models.unsplit import load_unsplit
from flowspec.sampling import NoiseRows, filtered, noise_for, pick

Tokens = Sequence[int]
SEEDS = 1 << 64


class Pair(NamedTuple):
    """A pair is two models whose tokens are the same."""

    target: Any
    draft: Any
    about: dict[str, Any]
    """The names of both and their dtype, for the estimates."""


def load_pair(
    target: Path, draft: Path, dtype: str, about: dict[str, str], threads: int | None
) -> Pair:
    """Return the models of these folders; they compute with this many threads, or torch's own."""
    if threads is not None:
        torch.set_num_threads(threads)
    return Pair(
        load_unsplit(target, dtype, "--target"),
        load_unsplit(draft, dtype, "--draft"),
        {**about, "dtype": dtype},
    )


@torch.inference_mode()
def written(
    model: Any, prompt: Tokens, sampling: Sampling, noise: NoiseRows | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the tokens of the model's text, each with the logits it was picked from.

    The text has no end. A forward computes the prompt, each further one a token."""
    fed, cache, position = torch.tensor([prompt]), None, len(prompt)
    while True:
        out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        row, cache = out.logits[0, -1], out.past_key_values
        token = pick(row, sampling, noise, position).token
        yield token, row
        fed, position = torch.tensor([[token]]), position + 1


# ---- acceptance ----------------------------------------------------------------------------------
class Judged(NamedTuple):
    """The tokens of one text, judged by the draft model."""

    matches: list[bool]
    """The draft model picks the same token, with the same noise if there is any."""
    shared: list[float]
    """Sum over the vocabulary of min(p, q); empty for a greedy text."""


def judge(pair: Pair, prompt: Tokens, sampling: Sampling, eos: Collection[int]) -> Judged:
    """Return how the draft model judges the text that the target writes after this prompt."""
    vocabulary = pair.target.config.get_text_config().vocab_size
    noise = noise_for(sampling, vocabulary)
    text: list[int] = []
    rows: list[Tensor] = []
    for token, row in islice(
        written(pair.target, prompt, sampling, noise), sampling.max_new_tokens
    ):
        text.append(token)
        rows.append(row)
        if token in eos:
            break
    judged = Judged([], [])
    for position, (token, ours, theirs) in enumerate(
        zip(text, rows, rows_behind(pair.draft, prompt, text), strict=True), len(prompt)
    ):
        theirs = theirs[:vocabulary]
        judged.matches.append(pick(theirs, sampling, noise, position).token == token)
        if noise is not None:
            judged.shared.append(overlap(ours, theirs, sampling))
    return judged


@torch.inference_mode()
def rows_behind(model: Any, prompt: Tokens, text: Tokens) -> Tensor:
    """Return the logits that the model would pick each token of the text from [text, vocabulary].

    It is one forward. A token that only the target has becomes the model's last: vocabularies may
    be padded differently."""
    last = model.config.get_text_config().vocab_size - 1
    ids = torch.tensor([[*prompt, *text[:-1]]]).clamp(max=last)
    return model(ids, use_cache=False, logits_to_keep=len(text)).logits[0]


def overlap(ours: Tensor, theirs: Tensor, sampling: Sampling) -> float:
    """Return the sum over the vocabulary of min(p, q) for the logits of p and q.

    Padding may differ: a token that one of them lacks has no share."""
    common = min(len(ours), len(theirs))
    p, q = filtered(ours, sampling)[:common], filtered(theirs, sampling)[:common]
    return float(torch.minimum(p, q).exp().sum())


def acceptance(
    pair: Pair, prompts: Sequence[Tokens], sampling: Sampling, positions: int, eos: Collection[int]
) -> list[Acceptance]:
    """Return the estimates for these settings: one if greedy, else one of each sampling rule.

    A text ends at the model's `positions`, too. Each prompt has a seed of its own, counted from the
    given one, for else texts of equally long prompts would share their luck."""
    assert sampling.seed is not None
    judged = []
    for number, prompt in enumerate(prompts):
        own = dataclasses.replace(
            sampling,
            seed=(sampling.seed + number) % SEEDS,
            max_new_tokens=min(sampling.max_new_tokens, positions - len(prompt)),
        )
        judged.append(judge(pair, prompt, own, eos))
    matches = [each.matches for each in judged]
    if sampling.temperature == 0:
        return [_observed(pair, "greedy", sampling, matches)]
    shared = [each.shared for each in judged]
    return [
        _observed(pair, "coupled", sampling, matches),
        _estimate(pair, "classic", sampling, shared),
    ]


def _observed(
    pair: Pair, rule: str, sampling: Sampling, texts: Sequence[Sequence[bool]]
) -> Acceptance:
    """Return the estimate for tokens that were accepted or not, with its runs."""
    found = [run for text in texts for run in runs(text)]
    estimate = _estimate(pair, rule, sampling, texts)
    table = lengths(found, estimate.acceptance)
    return dataclasses.replace(
        estimate,
        censored=sum(run.censored for run in found),
        lengths=tuple(table),
        p_value=p_value(table, estimate.acceptance),
    )


def _estimate(
    pair: Pair, rule: str, sampling: Sampling, texts: Sequence[Sequence[float]]
) -> Acceptance:
    accepted, tested = [sum(text) for text in texts], [len(text) for text in texts]
    return Acceptance(
        **pair.about,
        **fit(accepted, tested)._asdict(),
        rule=rule,
        temperature=sampling.temperature,
        seed=sampling.seed or 0,
        max_new_tokens=sampling.max_new_tokens,
        prompts=len(texts),
        accepted=sum(accepted),
        rejected=sum(tested) - sum(accepted),
    )


# ---- latency -------------------------------------------------------------------------------------
def latency(pair: Pair, prompts: Sequence[Tokens], new_tokens: int, repeats: int) -> Latency:
    """Return what forwards of both models take, each over its own greedy text of each prompt.

    The models take turns at each prompt, and in being first, so that what disturbs the machine
    meets both. Before, each writes the first prompt's text untimed. An end token ends no text."""
    first: dict[str, list[float]] = {"target": [], "draft": []}
    further: dict[str, list[float]] = {"target": [], "draft": []}
    sides = [("target", pair.target), ("draft", pair.draft)]
    for _, model in sides:
        timed(model, prompts[0], new_tokens)
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            for side, model in sides if (repeat + number) % 2 == 0 else reversed(sides):
                begun, *rest = timed(model, prompt, new_tokens)
                first[side].append(begun)
                further[side] += rest
    figures: dict[str, Any] = {}
    for side, _ in sides:
        for name, found in ((f"{side}_first", first[side]), (side, further[side])):
            low, middle, high = np.percentile(found, (10, 50, 90)).tolist()
            figures |= {f"{name}_ms": middle, f"{name}_range_ms": (low, high)}
    return Latency(
        **pair.about,
        **figures,
        threads=torch.get_num_threads(),
        prompts=len(prompts),
        prompt_tokens=float(statistics.median(map(len, prompts))),
        max_new_tokens=new_tokens,
        repeats=repeats,
    )


def timed(model: Any, prompt: Tokens, new_tokens: int) -> list[float]:
    """Return the milliseconds that each new token took, the first with the prompt."""
    times = [time.perf_counter()]
    for _ in islice(written(model, prompt, Sampling(), None), new_tokens):
        times.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in pairwise(times)]
