"""Rank 0 serves the person at the terminal: it streams texts and holds a conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.files import kept_lines
from flowspec.generation import Generation, Result, Token
from flowspec.journal import NONE, Journal

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def show_loading(engine: Engine) -> None:
    """Print a line for each rank when it holds its weights, and one each second until then."""

    def show(rank: int, facts: dict) -> None:
        size, seconds = facts["megabytes"], facts["seconds"]
        what = facts.get("what", "loading")
        print(
            f"rank {rank} of {engine.topology.ranks[-1]}: {what}, {size:.1f} MB in {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )

    engine.wait_until_loaded(show)


# ---- texts ---------------------------------------------------------------------------------------
def run(
    engine: Engine,
    prompts: Sequence[str],
    stop: Sequence[str],
    json_path: str | None,
    chat: bool,
    explain: bool = False,
) -> None:
    """Stream each prompt's continuation, show its table and write its JSON line.

    With `explain`, also show what the policy chose. With `chat`, use the chat template, and hold a
    conversation if no prompt was given."""
    journal = Journal.of_run()
    with kept_lines(json_path, "--json") as write:
        if chat and not prompts:
            converse(engine, stop, write, explain)
        for number, prompt in enumerate(prompts):
            past = journal.of(number) if journal else NONE
            if past.result is not None:
                write(past.result)
                continue
            asked: str | Sequence[int] = prompt
            if chat:
                asked = engine.text.encode_chat([{"role": "user", "content": prompt}])
            elif past.seed is None:
                print(prompt, end="", flush=True)
            seed = {} if past.seed is None else {"seed": past.seed}
            generation = engine.generate(asked, stop=stop, known=past.tokens, **seed)
            if journal:
                journal.begin(number, generation.request.sampling.seed)
                result = stream(_noted(generation, journal, number), generation)
                journal.end(number, result.line())
            else:
                result = stream(generation, generation)
            write(result.line())
            print(table(result), file=sys.stderr, flush=True)
            _explain(generation, explain)


def _noted(generation: Generation, journal: Journal, number: int) -> Iterator[Token]:
    """Yield the tokens, each when it is in the journal, which is when the next is known."""
    before: Token | None = None
    for token in generation:
        if before:
            journal.commit(number, before.id)
            yield before
        before = token
    if before:
        yield before


def stream(tokens: Iterable[Token], generation: Generation) -> Result:
    """Print a generation's text as it is committed.

    It is green if accepted from the draft, plain if the target's own."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for token in tokens:
        text = (
            f"{GREEN}{token.text}{RESET}"
            if colour and token.accepted and token.text
            else token.text
        )
        print(text, end="", flush=True)
    print(flush=True)
    assert generation.result is not None
    return generation.result


def _explain(generation: Generation, wanted: bool) -> None:
    for line in generation.explanation if wanted else []:
        print(f"  {line}", file=sys.stderr, flush=True)


def table(result: Result) -> str:
    """Return the small table that stands at the end."""
    rate = "-" if result.tokens_per_second is None else f"{result.tokens_per_second:.1f}"
    busy = " ".join(f"{share:.0%}" for share in result.stage_utilisation)
    rows = [
        ("method", result.method + (" (emulated times)" if result.emulated else "")),
        (
            "tokens",
            f"{result.prompt_tokens} of prompt, {result.new_tokens} new ({result.finish_reason})",
        ),
        ("speed", f"{rate} tokens/s, first token after {result.prefill_seconds:.2f} s"),
        ("accepted per segment", f"{result.accepted_per_segment:.2f}"),
        ("stage utilisation", busy),
        (
            "drafted / forwarded / accepted",
            f"{result.drafted_tokens} / {result.forwarded_tokens} / {result.accepted_tokens} "
            "tokens",
        ),
        ("seed", f"{result.seed}" if result.temperature else "none needed (greedy)"),
    ]
    return "\n".join(f"  {name:<31} {value}" for name, value in rows)


# ---- conversation --------------------------------------------------------------------------------
def converse(
    engine: Engine, stop: Sequence[str], write: Callable[[str], None], explain: bool
) -> None:
    """Read a line, answer it and remember both; an empty line or the end of input ends this."""
    turns: list[dict[str, str]] = []
    stops = [*stop, *engine.text.chat_stops]
    while line := _ask():
        turns.append({"role": "user", "content": line})
        try:
            generation = engine.generate(engine.text.encode_chat(turns), stop=stops)
            result = stream(generation, generation)
        except UserError as error:  # the conversation outgrew the model
            print(f"flowspec: {error}", file=sys.stderr)
            return
        write(result.line())
        _explain(generation, explain)
        turns.append({"role": "assistant", "content": result.text})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
