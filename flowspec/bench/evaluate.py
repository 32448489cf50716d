"""Questions are asked here: each turn of each, at each temperature, of each method in turn.

A generation is measured as `bench compare` does it (compare.measure), and kept as it comes. Methods
take turns within a turn of a question, and who begins rotates. The prompt of a later turn holds the
reference's answers (plain decoding's), so all methods read the same."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flowspec.bench.answers import Answer, Answers, Place, Skipped, reference
from flowspec.bench.compare import WARM_UP_TOKENS, Variant, measure, progress
from flowspec.bench.questions import Question
from flowspec.core.request import Sampling
from flowspec.engine import Engine
from flowspec.text import Text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan says what to ask of whom."""

    questions: Sequence[Question]
    methods: Sequence[str]
    temperatures: Sequence[float]
    length: int | None = None
    """If it is set, prompts have so many tokens: of the question and those behind it in the list,
    one after the other, and only the first turn is asked."""


def evaluate(engine: Engine, plan: Plan, answers: Answers) -> None:
    """Ask whatever the answers lack."""
    engine.traced = True
    cells = list(itertools.product(plan.questions, plan.temperatures))
    total, began, before = _total(plan, cells), time.monotonic(), len(answers)
    warm = False
    for number, (question, temperature) in enumerate(cells):
        for place, prompt, methods in _turns(engine, plan, answers, question, temperature):
            if not warm:
                warm = True
                _warm_up(engine, plan.methods, prompt)
            for method in _rotated(methods, number + place.turn):
                answers.keep(_answer(engine, question, number, place, method, prompt))
                done = len(answers) - before
                progress(done, max(total - before, done), time.monotonic() - began)
    print(f"{len(answers)} answers", file=sys.stderr, flush=True)


def _total(plan: Plan, cells: Sequence[tuple[Question, float]]) -> int:
    turns = sum(len(question.turns) if plan.length is None else 1 for question, _ in cells)
    return turns * len(plan.methods)


def _turns(
    engine: Engine, plan: Plan, answers: Answers, question: Question, temperature: float
) -> Iterator[tuple[Place, tuple[int, ...], list[str]]]:
    """Yield each turn that methods have still to answer: place, prompt, and these methods.

    A turn's answers must be there when the next one is asked for."""
    said: list[dict[str, str]] = []
    for turn, words in enumerate(question.turns if plan.length is None else (None,), 1):
        place = Place(question.dataset, question.id, turn, temperature)
        if answers.skipped(place):
            return
        said.append({"role": "user", "content": words or ""})
        missing = [method for method in plan.methods if answers.of(place, method) is None]
        if missing:
            prompt = prompt_of(engine.text, plan, question, said)
            if why := too_long(engine, prompt):
                answers.keep(Skipped(place, why))
                print(f"skipped: {', '.join(map(str, place))}: {why}", file=sys.stderr)
                return
            yield place, prompt, missing
        told = answers.of(place, reference(plan.methods))
        assert told is not None
        said.append({"role": "assistant", "content": told.text})


def too_long(engine: Engine, prompt: Sequence[int]) -> str | None:
    """Return why a prompt does not fit, with all of its answer, into the model's positions."""
    most, room = engine.config.sampling.max_new_tokens, engine.manifest.max_positions
    if len(prompt) + most <= room:
        return None
    return f"{len(prompt)} tokens of prompt and {most} new ones; the model takes {room}"


def prompt_of(
    text: Text, plan: Plan, question: Question, said: Sequence[dict[str, str]]
) -> tuple[int, ...]:
    """Return the tokens of what was said, or of a prompt of the plan's length."""
    if plan.length is None:
        return text.encode_chat(said)
    at, tokens = plan.questions.index(question), list[int]()
    for each in itertools.cycle([*plan.questions[at:], *plan.questions[:at]]):
        tokens += text.encode("\n".join(each.turns) + "\n")
        if len(tokens) >= plan.length:
            break
    return tuple(tokens[: plan.length])


def _rotated(methods: Sequence[str], by: int) -> list[str]:
    by %= len(methods)
    return [*methods[by:], *methods[:by]]


def _warm_up(engine: Engine, methods: Sequence[str], prompt: Sequence[int]) -> None:
    short = dataclasses.replace(engine.config.sampling, max_new_tokens=WARM_UP_TOKENS)
    for method in methods:
        measure(engine, 0, 0, prompt, Variant(method, method, engine.config.policy), short)


def _answer(
    engine: Engine,
    question: Question,
    number: int,
    place: Place,
    method: str,
    prompt: Sequence[int],
) -> Answer:
    config, stops = engine.config, engine.text.chat_stops
    variant = Variant(method, method, config.policy)
    sampling = sampling_of(config.sampling, question, place.temperature)
    run = measure(engine, number + 1, 1, prompt, variant, sampling, stops)
    result = run.result
    return Answer(
        **vars(run.record()),
        dataset=place.dataset,
        question=place.question,
        category=question.category,
        turn=place.turn,
        prompt_tokens=result.prompt_tokens,
        token_ids=result.token_ids,
        text=result.text,
        finish_reason=result.finish_reason,
        decode_seconds=result.decode_seconds,
        emulated=result.emulated,
    )


def sampling_of(base: Sampling, question: Question, temperature: float) -> Sampling:
    """Return how a question is answered: with noise of its own, so questions are independent."""
    seed = (base.seed or 0) + question.place
    return dataclasses.replace(base, temperature=temperature, seed=seed)
