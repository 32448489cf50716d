"""What is sent back: one stream of pieces, in the words of four interfaces.

An answer is told of the pieces as they come. It says what a stream says of them (`begin`, `say`,
`end`: lists of events), and at last what the whole is (`whole`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowspec.http.asked import Asked
from flowspec.http.calls import Call, Piece

if TYPE_CHECKING:
    from flowspec.generation import Token
    from flowspec.text import Text

Event = dict[str, Any]


class Answer:
    """An answer of one interface; the pieces that it was told of are kept here."""

    prefix = ""
    """Its id begins so."""
    named = False
    """Events of its streams have names, and no [DONE] ends them."""

    def __init__(self, call: Call, asked: Asked, id: str, model: str, text: Text):
        self.call, self.asked, self.model, self.tokenizer = call, asked, model, text
        self.id, self.created = f"{self.prefix}{id}", int(time.time())
        self.texts = [""] * len(call.texts)
        self.finishes: list[str | None] = [None] * len(call.texts)
        self.tokens: list[list[Token]] = [[] for _ in call.texts]

    def told(self, piece: Piece) -> list[Event]:
        """Take in a piece, and return what a stream says of it."""
        events = self.say(piece)
        self.texts[piece.number] += piece.text
        self.tokens[piece.number] += piece.tokens
        self.finishes[piece.number] = piece.finish
        return events

    def begin(self) -> list[Event]:
        return []

    def say(self, piece: Piece) -> list[Event]:
        raise NotImplementedError

    def end(self) -> list[Event]:
        return []

    def whole(self) -> Event:
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        return "logprobs" in self.asked.options

    def text_of(self, token: int) -> str:
        return self.tokenizer.decode([token])


# ---- OpenAI's two older interfaces ---------------------------------------------------------------
class Choices(Answer):
    """Answers that have a choice for each text."""

    kind = chunk_kind = ""

    def _frame(self, kind: str, choices: Sequence[Event], usage: Event | None = None) -> Event:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        more = {"usage": usage} if usage or self.asked.usage else {}
        return {**frame, "choices": [*choices], **more}

    def _usage(self) -> Event:
        usage = self.call.usage()
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": usage.accepted,
                "rejected_prediction_tokens": usage.rejected,
            },
        }

    def say(self, piece: Piece) -> list[Event]:
        if not (piece.text or piece.finish or (self.wants_logprobs and piece.tokens)):
            return []
        choice = {
            "index": piece.number,
            **self.delta(piece),
            "logprobs": self.logprobs(piece.tokens, len(self.texts[piece.number])),
            "finish_reason": piece.finish,
        }
        if self.asked.origins:
            choice["origins"] = [[token.text, token.accepted] for token in piece.tokens]
        return [self._frame(self.chunk_kind, [choice])]

    def end(self) -> list[Event]:
        return [self._frame(self.chunk_kind, [], self._usage())] if self.asked.usage else []

    def whole(self) -> Event:
        choices = [
            {
                "index": index,
                **self.content(text),
                "logprobs": self.logprobs(self.tokens[index], 0),
                "finish_reason": self.finishes[index],
            }
            for index, text in enumerate(self.texts)
        ]
        return self._frame(self.kind, choices, self._usage())

    def delta(self, piece: Piece) -> Event:
        raise NotImplementedError

    def content(self, text: str) -> Event:
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[Token], offset: int) -> Event | None:
        """Return what is told of these tokens; `offset` is where in the text they begin."""
        raise NotImplementedError


class CompletionAnswer(Choices):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def delta(self, piece: Piece) -> Event:
        return self.content(piece.text)

    def content(self, text: str) -> Event:
        return {"text": text}

    def logprobs(self, tokens: Sequence[Token], offset: int) -> Event | None:
        if not self.wants_logprobs:
            return None
        texts = [self.text_of(token.id) for token in tokens]
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.text))
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.text_of(id): logprob for id, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets[:-1],
        }


class ChatAnswer(Choices):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[Event]:
        first = {"role": "assistant", "content": ""}
        return [
            self._frame(
                self.chunk_kind,
                [{"index": index, "delta": first, "logprobs": None, "finish_reason": None}],
            )
            for index in range(len(self.texts))
        ]

    def delta(self, piece: Piece) -> Event:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def content(self, text: str) -> Event:
        return {"message": {"role": "assistant", "content": text}}

    def logprobs(self, tokens: Sequence[Token], offset: int) -> Event | None:
        if not self.wants_logprobs:
            return None
        told = [
            {
                **self._one(token.id, token.logprob),
                "top_logprobs": [self._one(id, logprob) for id, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": told}

    def _one(self, token: int, logprob: float | None) -> Event:
        text = self.text_of(token)
        whole = (
            "\ufffd" not in text
        )  # else it is a part of a character, of which no bytes are known
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()] if whole else None}


# ---- the adapters --------------------------------------------------------------------------------
class ResponseAnswer(Answer):
    """An answer of /v1/responses."""

    prefix, named = "resp_", True
    _number = -1

    def begin(self) -> list[Event]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
            self._event(
                "response.output_item.added", output_index=0, item=self._item("in_progress")
            ),
            self._event("response.content_part.added", **place, part=self._part("")),
        ]

    def say(self, piece: Piece) -> list[Event]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        if not piece.text:
            return []
        return [self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])]

    def end(self) -> list[Event]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        text, whole = self.texts[0], self.whole()
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=self._part(text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def whole(self) -> Event:
        return self._response("completed" if self.finishes[0] == "stop" else "incomplete")

    def _event(self, type: str, **more: Any) -> Event:
        self._number += 1
        return {"type": type, "sequence_number": self._number, **more}

    @property
    def _item_id(self) -> str:
        return self.id.replace(self.prefix, "msg_", 1)

    def _part(self, text: str) -> Event:
        return {"type": "output_text", "text": text, "annotations": []}

    def _item(self, status: str) -> Event:
        content = [] if status == "in_progress" else [self._part(self.texts[0])]
        item = {"type": "message", "id": self._item_id, "role": "assistant"}
        return {**item, "status": status, "content": content}

    def _response(self, status: str) -> Event:
        sampling, going = self.call.texts[0].request.sampling, status == "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": [] if going else [self._item(status)],
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "error": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "usage": None if going else self._usage(),
        }

    def _usage(self) -> Event:
        usage = self.call.usage()
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }


class MessageAnswer(Answer):
    """An answer of /v1/messages."""

    prefix, named = "msg_", True

    def begin(self) -> list[Event]:
        block = {"type": "text", "text": ""}
        return [
            {"type": "message_start", "message": self._message([], None)},
            {"type": "content_block_start", "index": 0, "content_block": block},
        ]

    def say(self, piece: Piece) -> list[Event]:
        delta = {"type": "text_delta", "text": piece.text}
        return [{"type": "content_block_delta", "index": 0, "delta": delta}] if piece.text else []

    def end(self) -> list[Event]:
        whole = self.whole()
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
        return [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": delta, "usage": whole["usage"]},
            {"type": "message_stop"},
        ]

    def whole(self) -> Event:
        met = self.call.texts[0].met
        reason = "end_turn" if self.finishes[0] == "stop" else "max_tokens"
        own = met in self.asked.stop
        content = [{"type": "text", "text": self.texts[0]}]
        message = self._message(content, "stop_sequence" if own else reason)
        return {**message, "stop_sequence": met if own else None}

    def _message(self, content: Sequence[Event], reason: str | None) -> Event:
        usage = self.call.usage()
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [*content],
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion},
        }
