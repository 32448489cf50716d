"""Calls: the texts that the engine is making for clients, and how many more there may be.

All of this runs in the server's event loop. A call goes on at the ring's pace, whether its client
reads slowly, stops reading, or reads fast: what is not read yet waits here, at most as many tokens
as were asked for."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.concurrency import run_in_threadpool

from flowspec.errors import UserError
from flowspec.http.asked import Asked
from flowspec.http.metrics import Metrics
from flowspec.http.refusal import Refusal

if TYPE_CHECKING:
    from flowspec.engine import Engine
    from flowspec.generation import Generation, Token
    from flowspec.text import Text

LOADING = "the model is being loaded"


class Piece(NamedTuple):
    """A piece is what became certain of one of a call's texts."""

    number: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None = None
    """The text ends here, for this reason (stop, length, cancelled)."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """How many tokens a call took."""

    prompt: int
    completion: int
    accepted: int
    """So many of them had been drafted and were on their way before the target picked them."""
    rejected: int
    """So many drafted tokens were sent into the ring in vain."""


class Calls:
    """The calls of a server, which serves a model under a name.

    `most` texts may be in the ring or wait for room in it."""

    def __init__(self, name: str, most: int, metrics: Metrics):
        self.name, self.most, self.metrics = name, most, metrics
        self.engine: Engine | None = None
        self.why_not: str | None = LOADING
        """This is why no call is taken on; None if they are."""
        self.broken = False
        """The run has failed, or ends: it will take on no call again."""
        self.taken = 0
        """So many texts are asked for and not over."""
        self.open: set[Call] = set()
        self.tasks: set[asyncio.Task] = set()

    # ---- what becomes of the run -----------------------------------------------------------------
    def ready(self) -> Engine:
        """Return the engine; raise Refusal while, or since, there is none."""
        if self.why_not is not None or self.engine is None:
            raise Refusal(503, self.why_not or LOADING, headers={"Retry-After": "5"})
        return self.engine

    def attach(self, engine: Engine) -> None:
        """Take calls on: every rank is loaded."""
        self.engine = engine
        if not self.broken:
            self.why_not = None

    def fail(self, why: str) -> None:
        """Take on no more, and end those that are open; the first reason counts."""
        if not self.broken:
            self.broken, self.why_not = True, why
            for call in self.open:
                call.fail(Refusal(503, why))

    # ---- a call ----------------------------------------------------------------------------------
    async def begin(self, asked: Asked, id: str) -> Call:
        """Begin with the texts that are asked for; raise Refusal if that cannot be done.

        The call is known by this id while it is open."""
        engine = self.ready()
        if asked.model not in (None, self.name):
            message = f"model is {asked.model!r:.100}: this server has {self.name!r}"
            raise Refusal(404, message, "model", "model_not_found")
        options = asked.options
        self._take(asked.texts)
        generations: list[Generation] = []
        try:
            prompts = await run_in_threadpool(_encoded, engine.text, asked)
            self.ready()
            for tokens in prompts:
                _check_room(len(tokens), engine, asked)
            for tokens in prompts:
                for number in range(asked.n):
                    own = {**options, "seed": _seed(options, engine, number)}
                    generations.append(engine.submit(tokens, stop=_stops(engine, asked), **own))
        except BaseException as error:
            self.taken -= asked.texts
            for generation in generations:
                generation.cancel()
            if isinstance(error, UserError):
                raise Refusal(400, str(error), _param(str(error), asked)) from None
            raise
        return Call(self, id, generations, sum(map(len, prompts)))

    def _take(self, texts: int) -> None:
        if texts > self.most:
            message = f"{texts} texts are asked for at once: this server takes {self.most}"
            raise Refusal(400, message, "n")
        if self.taken + texts > self.most:
            message = f"{self.taken} texts are being made or wait, and {self.most} may: try later"
            seconds = math.ceil(min(60.0, max(1.0, self.metrics.usual_seconds)))
            raise Refusal(429, message, headers={"Retry-After": str(seconds)})
        self.taken += texts

    def keep(self, task: asyncio.Task) -> None:
        """Hold a task until it is done, since the event loop does not."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Call:
    """A call is one client's texts, while they are made."""

    def __init__(self, calls: Calls, id: str, generations: Sequence[Generation], prompt: int):
        self.id = id
        self._calls, self.texts, self._prompt = calls, generations, prompt
        self._begun = time.monotonic()
        self._queue: asyncio.Queue[Piece | Refusal] = asyncio.Queue()
        calls.open.add(self)
        for number, generation in enumerate(generations):
            calls.keep(asyncio.create_task(self._read(number, generation)))

    def usage(self) -> Usage:
        accepted = sum(each.accepted for each in self.texts)
        sent = sum(each.stats.guesses for each in self.texts)
        made = sum(len(each.token_ids) for each in self.texts)
        return Usage(self._prompt, made, accepted, max(0, sent - accepted))

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield what became certain since the last time, a piece of each text that went on.

        Raise Refusal if the run breaks."""
        left = len(self.texts)
        while left:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            pieces = _joined(items)
            left -= sum(piece.finish is not None for piece in pieces)
            yield pieces

    def cancel(self) -> None:
        """Let go of it: nobody reads it any more. What is not over yet is cancelled."""
        self._calls.open.discard(self)
        for generation in self.texts:
            if not generation.done:
                generation.cancel()

    def fail(self, why: Refusal) -> None:
        self._queue.put_nowait(why)

    async def _read(self, number: int, generation: Generation) -> None:
        """Read a text to its end, whoever is there to hear of it."""
        watch = self._calls.metrics.watch(self._begun)
        try:
            async for token in generation:
                watch.token(token.accepted)
                self._queue.put_nowait(Piece(number, token.text, (token,)))
            assert generation.result is not None
            watch.over(generation.result, generation.stats)
            finish = generation.result.finish_reason
            self._queue.put_nowait(Piece(number, "", (), finish))
        except Exception as error:
            self._calls.metrics.failed()
            self._calls.fail(str(error))
        finally:
            self._calls.taken -= 1


def _joined(items: Sequence[Piece | Refusal]) -> list[Piece]:
    """Return pieces with those of the same text made one; raise a Refusal among them."""
    found: dict[int, Piece] = {}
    for item in items:
        if isinstance(item, Refusal):
            raise item
        before = found.get(item.number, Piece(item.number, "", ()))
        text, tokens = before.text + item.text, before.tokens + item.tokens
        found[item.number] = Piece(item.number, text, tokens, item.finish)
    return [*found.values()]


# ---- what is asked for, as the engine takes it ---------------------------------------------------
def _encoded(text: Text, asked: Asked) -> list[Sequence[int]]:
    """Return the prompts as tokens; UserError if a conversation cannot be made one."""
    if not asked.turns:
        return [text.encode(each) if isinstance(each, str) else each for each in asked.prompts]
    if asked.tools and "tools" not in text.template:
        raise Refusal(400, "tools: the model's chat template has no place for them", "tools")
    return [text.encode_chat(asked.turns, asked.tools)]


def _stops(engine: Engine, asked: Asked) -> list[str]:
    return [*asked.stop, *(engine.text.chat_stops if asked.turns else ())]


def _check_room(tokens: int, engine: Engine, asked: Asked) -> None:
    """Raise Refusal unless prompt and new tokens fit into the model's positions."""
    limit, most = engine.manifest.max_positions, asked.options.get("max_new_tokens", 1)
    if tokens + most > limit:
        message = f"the prompt has {tokens} tokens and {asked.limit} is {most}: the model takes {limit} in all"
        param = asked.limit if tokens < limit else _prompt(asked)
        raise Refusal(400, message, param, "context_length_exceeded")


def _seed(options: dict[str, Any], engine: Engine, number: int) -> int | None:
    first = options.get("seed", engine.config.sampling.seed)
    return None if first is None else (first + number) % 2**64


def _param(message: str, asked: Asked) -> str | None:
    """Return the parameter of which the engine's message speaks."""
    if found := re.match(r"sampling\.(\w+)", message):
        return asked.limit if found[1] == "max_new_tokens" else found[1]
    return asked.limit if message.startswith("the request may need") else _prompt(asked)


def _prompt(asked: Asked) -> str:
    return "messages" if asked.turns else "prompt"
