"""What a client may ask for: the bodies of the four interfaces, and the one thing they all mean.

A field that stands here is honoured, or refused by name; a field that does not is refused. `null`
is as if the field were absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flowspec.http.refusal import Refusal

SAMPLED = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""These fields are called in a body as they are in `Sampling`."""
MOST_TEXTS = 128
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Asked:
    """This is what is asked for, whichever interface it came by."""

    prompts: Sequence[str | Sequence[int]] = ()
    turns: Sequence[dict[str, Any]] = ()
    """If there are turns of a conversation, they stand instead of prompts."""
    tools: Sequence[dict[str, Any]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """These are fields of `Sampling`."""
    stop: Sequence[str] = ()
    n: int = 1
    stream: bool = False
    usage: bool = False
    """A stream ends with what it took."""
    origins: bool = False
    """A stream says of each token whether the draft had sent it (an addition to OpenAI's)."""
    model: str | None = None
    limit: str = "max_tokens"
    """By this name the interface calls the limit of new tokens."""

    @property
    def texts(self) -> int:
        """Return how many texts are asked for."""
        return self.n * (1 if self.turns else len(self.prompts))


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_origins: bool | None = None


class Sampled(Body):
    """The fields that all interfaces share."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    def common(self, most: int | None, stop: str | Sequence[str] | None) -> dict[str, Any]:
        """Return the fields of Asked that all interfaces have."""
        options = {name: getattr(self, name, None) for name in (*SAMPLED, "logit_bias")}
        options["max_new_tokens"] = most
        return {
            "options": {name: value for name, value in options.items() if value is not None},
            "stop": [stop] if isinstance(stop, str) else [*(stop or ())],
            "stream": bool(self.stream),
            "model": self.model,
        }


class OpenAI(Sampled):
    """The fields that OpenAI's two older interfaces share."""

    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: Stop | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    user: str | None = None

    def texts(self, most: int | None, logprobs: int | None) -> dict[str, Any]:
        options = self.stream_options
        if options and not self.stream:
            raise Refusal(400, "stream_options are for stream: true", "stream_options")
        found = self.common(most, self.stop)
        if self.logit_bias is not None:
            found["options"]["logit_bias"] = {_token(k): v for k, v in self.logit_bias.items()}
        if logprobs is not None:
            found["options"]["logprobs"] = logprobs
        usage = bool(options and options.include_usage)
        origins = bool(options and options.include_origins)
        return {**found, "n": self.n or 1, "usage": usage, "origins": origins}


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise Refusal(400, f"logit_bias: {key[:20]!r} is not the number of a token", "logit_bias")
    return int(key)


class Completion(OpenAI):
    """POST /v1/completions."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def asked(self) -> Asked:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts = [self.prompt] if one else self.prompt
        return Asked(prompts=prompts, **self.texts(self.max_tokens, self.logprobs))  # type: ignore[arg-type]


# ---- conversations -------------------------------------------------------------------------------
class Part(Body):
    """A part of a message's content: text, as the interfaces call it."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    citations: None = None
    cache_control: Any = None


Content = str | list[Part]


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class Call(Body):
    """What a message says of a tool that the model called."""

    class Function(Body):
        name: str
        arguments: str

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function

    def turn(self) -> dict[str, Any]:
        # templates write the arguments as JSON, so they are given them as what that means
        told = self.function.arguments
        try:
            arguments = json.loads(told)
        except (ValueError, RecursionError):
            raise Refusal(
                400, "messages: a tool call's arguments are no JSON", "messages"
            ) from None
        return {
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    # an answer is often sent back as it came
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None

    def turn(self) -> dict[str, Any]:
        """Return the message as a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        calls = {"tool_calls": [call.turn() for call in self.tool_calls]} if self.tool_calls else {}
        given = {key: value for key, value in more.items() if value is not None}
        return {"role": role, "content": _text(self.content), **given, **calls}


class Function(Body):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


def _tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    told = {"name": name, "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": told}


class TextFormat(Body):
    type: Literal["text"]


class Chat(OpenAI):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: TextFormat | None = None

    def asked(self) -> Asked:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs are for logprobs: true", "top_logprobs")
        limits = {x for x in (self.max_tokens, self.max_completion_tokens) if x is not None}
        if len(limits) > 1:
            raise Refusal(
                400, "max_tokens and max_completion_tokens differ: give one", "max_tokens"
            )
        tools = [] if self.tool_choice == "none" else self.tools or []
        return Asked(
            turns=[message.turn() for message in self.messages],
            tools=[
                _tool(t.function.name, t.function.description, t.function.parameters) for t in tools
            ],
            **self.texts(
                max(limits, default=None), (self.top_logprobs or 0) if self.logprobs else None
            ),
        )


# ---- the adapters --------------------------------------------------------------------------------
class Item(Body):
    """A turn of /v1/responses, also one that was an answer."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None


class FlatTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class Response(Sampled):
    """POST /v1/responses."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    text: TextOptions | None = None
    store: Literal[False] | None = None
    user: str | None = None

    def asked(self) -> Asked:
        items = (
            [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        )
        told = (
            [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        )
        turns = [*told, *(Message(role=item.role, content=item.content) for item in items)]
        tools = [] if self.tool_choice == "none" else self.tools or []
        return Asked(
            turns=[turn.turn() for turn in turns],
            tools=[_tool(tool.name, tool.description, tool.parameters) for tool in tools],
            limit="max_output_tokens",
            **self.common(self.max_output_tokens, None),
        )


class Turn(Body):
    role: Literal["user", "assistant"]
    content: Content


class AnthropicTool(Body):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None


class AnthropicChoice(Body):
    type: Literal["auto", "none"]


class Messages(Sampled):
    """POST /v1/messages."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Count
    system: Content | None = None
    stop_sequences: Stops | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    metadata: dict[str, Any] | None = None

    def asked(self) -> Asked:
        told = [] if self.system is None else [Message(role="system", content=self.system)]
        turns = [*told, *(Message(role=turn.role, content=turn.content) for turn in self.messages)]
        none = self.tool_choice is not None and self.tool_choice.type == "none"
        tools = [] if none else self.tools or []
        return Asked(
            turns=[turn.turn() for turn in turns],
            tools=[_tool(tool.name, tool.description, tool.input_schema) for tool in tools],
            **self.common(self.max_tokens, self.stop_sequences),
        )
