"""A generation is what a caller holds of a request: its tokens as they come, and what it took."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowspec.core.request import Request
from flowspec.runtime.driver import Committed, Stats, Ticket
from flowspec.runtime.stream import Ended
from flowspec.sampling import Logprobs
from flowspec.text import TextStream
from flowspec.trace import Span


class Token(NamedTuple):
    """A token of the output, as it is committed."""

    id: int
    text: str
    """This text became certain with it: whole characters, perhaps none."""
    accepted: bool
    """This is True if the draft had it and it was on its way already, False if it is the target's
    own."""
    gap: float
    """This is the target's lead of this token over the next best one: of the logit, above
    temperature 0 of the perturbed log-probability."""
    logprob: float | None = None
    """This is the token's log-probability by the target's logits as they are; None unless
    `sampling.logprobs` asks for it."""
    top: tuple[tuple[int, float], ...] = ()
    """These are the `sampling.logprobs` likeliest tokens at its place and their log-probabilities,
    from the top; the token itself is among them only if it is so likely."""


@dataclass(frozen=True)
class Result:
    """A result says what one generation was, in the fields of the result JSON (seconds, tokens)."""

    method: str
    prompt_tokens: int
    new_tokens: int
    known_tokens: int
    """So many of the new tokens were known when the generation began (`Engine.submit`)."""
    token_ids: list[int]
    text: str
    """This was streamed: `token_ids` decoded, without bytes at the end that are no whole
    character."""
    finish_reason: str
    """The reason is stop (an end token or a stop text), length (a limit) or cancelled."""
    prefill_seconds: float
    """It took so many seconds from the request to the first token known."""
    decode_seconds: float
    """It took so many seconds from there to the last token."""
    tokens_per_second: float | None
    """This is (new_tokens - known_tokens - 1) / decode_seconds; None for one token."""
    accepted_per_segment: float
    """This is the number of new tokens that were not known over that of returned segments."""
    accepted_tokens: int
    """The draft had sent so many of the new tokens before the target picked them."""
    drafted_tokens: int
    forwarded_tokens: int
    """The first stage computed so many tree rows."""
    stage_utilisation: list[float]
    """Each stage spent this share of the request's time computing."""
    bookkeeping_ms: float
    """Rank 0's own CPU time for each segment sent, in ms: neither drafting, lm_head, sampling nor
    waiting."""
    stage_overhead_ms: list[float]
    """Each stage's own CPU time for a segment, in ms: neither the model's forward, lm_head,
    sampling nor waiting."""
    costs: dict[str, Any]
    """This is what the run has measured so far of the stages, the links and the drafter
    (core/costs.py); `simulate --costs` reads it."""
    stage_peak_mb: list[float]
    """Each stage's process held at most so much resident memory so far, in MB."""
    world_size: int
    seed: int
    temperature: float
    emulated: bool
    """This is True if the times are those of an emulated cluster."""
    logprobs: list[Logprobs] | None = None
    """These are `logprob` and `top` (see Token) of each new token that was not known, if
    `sampling.logprobs` asks for them."""

    def line(self) -> str:
        """Return the result as a line of JSON, without its end."""
        return json.dumps(dataclasses.asdict(self))


class Generation:
    """A generation is an iterator of Token (`for` or `async for`) for one reader in any thread.

    Tokens are made whether or not they are read. `result` is there once the iterator is exhausted
    or closed. A generation that nobody holds any more is cancelled."""

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        stream: TextStream,
        finished: Callable[[Generation], Result],
        known: Sequence[int] = (),
    ):
        """`stream` makes text of tokens; `finished` is called once, when all is known.

        The request's prompt ends with the tokens of the text that are `known` already."""
        self.request, self.known = request, len(known)
        self._ticket, self._stream, self._finished = ticket, stream, finished
        self.token_ids = [*known]
        for token in known:
            stream.push(token)
        self.accepted = 0
        """So many of them the draft had sent before the target picked them."""
        self.logprobs: list[Logprobs] | None = None if request.sampling.logprobs is None else []
        """They belong to the tokens that were not known; None unless the request asks for them."""
        self._stopped = False  # the reader wants no more
        self.done = False
        """Nothing more comes: there is a result, or the run has broken."""
        self.result: Result | None = None
        self.spans: list[Span] = []
        """All ranks did this, once there is a result; it is empty unless `trace` is set."""
        self.explanation: list[str] = []
        """The policy chose this, and why, once there is a result."""

    @property
    def stats(self) -> Stats:
        """Return what the request took; it is complete once there is a result."""
        return self._ticket.stats

    @property
    def text(self) -> str:
        """Return the text so far, as it was streamed."""
        return self._stream.text

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        if self.done:
            raise StopIteration
        try:
            while self._stopped:
                self._ticket.tokens.get()  # what came after the end that the reader wanted
            return self._token(self._ticket.tokens.get())
        except BaseException as end:
            self._finish(end)
            raise StopIteration from None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        if self.done:
            raise StopAsyncIteration
        try:
            while self._stopped:
                await self._ticket.tokens.aget()
            return self._token(await self._ticket.tokens.aget())
        except BaseException as end:
            self._finish(end)
            raise StopAsyncIteration from None

    def _token(self, token: Committed) -> Token:
        self.token_ids.append(token.id)
        self.accepted += token.accepted
        stream = self._stream
        piece = stream.push(token.id) + (stream.flush() if token.final else "")
        if stream.stopped:
            self.cancel()
        if token.logprobs is None or self.logprobs is None:
            return Token(token.id, piece, token.accepted, token.gap)
        self.logprobs.append(token.logprobs)
        return Token(token.id, piece, token.accepted, token.gap, *token.logprobs)

    @property
    def met(self) -> str | None:
        """Return the stop text that ended it."""
        return self._stream.met

    def cancel(self) -> None:
        """Ask for no more: its rows in the ring are freed at once, and what is read next is its
        end."""
        if not self._stopped:
            self._stopped = True
            self._ticket.cancel()

    def _finish(self, end: BaseException) -> None:
        """Make the result; raise what broke the run, or an interruption of the reader."""
        if not isinstance(end, Ended):
            self.done = self._ticket.tokens.ended
            raise end
        self.done = True
        self.spans, self.explanation = self.stats.spans, self.stats.explanation
        if self._stream.stopped:
            self.stats.finish_reason = "stop"
        elif self._stopped:
            self.stats.finish_reason = "cancelled"
        self.result = self._finished(self)

    def close(self) -> None:
        """Cancel what is not generated yet; the result says what was read."""
        self.cancel()
        for _ in self:
            raise AssertionError("a token after the end")

    def __del__(self) -> None:
        if not self.done:
            self._ticket.abandon()
