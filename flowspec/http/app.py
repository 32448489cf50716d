"""The routes of the server."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from flowspec.http.answers import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    MessageAnswer,
    ResponseAnswer,
)
from flowspec.http.asked import Chat, Completion, Messages, Response
from flowspec.http.calls import Call, Calls
from flowspec.http.guard import Guard
from flowspec.http.page import add_page
from flowspec.http.pipeline import Pipeline
from flowspec.http.refusal import Refusal, body
from flowspec.version import __version__


def make_app(
    calls: Calls,
    key: str | None,
    most: int,
    compat: str | None = None,
    log: Callable[[str], None] | None = None,
) -> ASGIApp:
    """Return the application that serves these calls; the rest is as for Guard.

    `compat` says whose names the metrics have: vllm, or None for our own."""
    app = FastAPI(title="flowspec", version=__version__, docs_url=None, redoc_url=None)
    _add_facts(app, calls, compat)
    add_page(app)
    _add_pipeline(app, Pipeline(calls))
    for path, kind, answer in (
        ("/v1/completions", Completion, CompletionAnswer),
        ("/v1/chat/completions", Chat, ChatAnswer),
        ("/v1/responses", Response, ResponseAnswer),
        ("/v1/messages", Messages, MessageAnswer),
    ):
        app.post(path)(_route(calls, kind, answer))
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)
    app.exception_handler(Exception)(_failed)
    return Guard(app, key, most, log)


# ---- facts ---------------------------------------------------------------------------------------
def _add_facts(app: FastAPI, calls: Calls, compat: str | None) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        calls.ready()
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(calls)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != calls.name:
            raise Refusal(404, f"this server has {calls.name!r}", "model", "model_not_found")
        return _model(calls)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        load = calls.engine.load if calls.engine else None
        page = calls.metrics.text(calls.name, load, compat == "vllm")
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")


def _model(calls: Calls) -> dict[str, Any]:
    engine, facts = calls.engine, {}
    if engine:
        facts = {
            "max_model_len": engine.manifest.max_positions,
            "chat_template": engine.text.has_template,
        }
    return {"id": calls.name, "object": "model", "created": 0, "owned_by": "flowspec", **facts}


def _add_pipeline(app: FastAPI, pipeline: Pipeline) -> None:
    @app.get("/pipeline", include_in_schema=False)
    async def watch(request: str | None = None) -> StreamingResponse:
        watcher = pipeline.enter(request)
        return _Streaming(pipeline.events(watcher), functools.partial(pipeline.leave, watcher))


# ---- texts ---------------------------------------------------------------------------------------
def _route(calls: Calls, kind: Any, make: type[Answer]) -> Callable[..., Any]:
    """Return the handler of an interface: what is asked in it, how it is answered."""

    async def handle(request: Request, asked: Any) -> Any:
        wanted = asked.asked()
        visit = request.scope["flowspec"]
        call = await calls.begin(wanted, visit.id)
        assert calls.engine is not None
        answer = make(call, wanted, visit.id, calls.name, calls.engine.text)
        closing = _Closing(call, visit.facts)
        if wanted.stream:
            return _Streaming(_events(answer, request.url.path), closing)
        watcher = asyncio.create_task(_cancel_if_gone(request, call))
        try:
            async for pieces in call.pieces():
                for piece in pieces:
                    answer.told(piece)
            return JSONResponse(answer.whole())
        finally:
            watcher.cancel()
            closing()

    handle.__annotations__["asked"] = kind
    return handle


class _Closing:
    """What is to be done when a call is answered, or is not any more."""

    def __init__(self, call: Call, facts: dict[str, Any]):
        self._call, self._facts = call, facts

    def __call__(self) -> None:
        self._call.cancel()
        self._facts |= vars(self._call.usage())


async def _cancel_if_gone(request: Request, call: Call) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.cancel()


class _Streaming(StreamingResponse):
    """Server-sent events. Whatever becomes of the client, `closing` is called at the end."""

    def __init__(self, events: AsyncIterator[str], closing: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closing()


async def _events(answer: Answer, path: str) -> AsyncIterator[str]:
    try:
        for event in answer.begin():
            yield _event(answer, event)
        async for pieces in answer.call.pieces():
            told = [event for piece in pieces for event in answer.told(piece)]
            if told:
                yield "".join(_event(answer, event) for event in told)
        for event in answer.end():
            yield _event(answer, event)
    except Refusal as error:
        told = body(error.status_code, error.detail, error.param, error.code, path)
        yield _event(answer, {"type": "error", **told} if answer.named else told)
    if not answer.named:
        yield "data: [DONE]\n\n"


def _event(answer: Answer, event: dict[str, Any]) -> str:
    name = f"event: {event['type']}\n" if answer.named else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n"


# ---- errors --------------------------------------------------------------------------------------
def _error(
    request: Request, status: int, message: str, param: str | None = None, **more: Any
) -> JSONResponse:
    told = body(status, message, param, more.get("code"), request.url.path)
    return JSONResponse(told, status, more.get("headers"))


async def _refused(request: Request, error: Any) -> JSONResponse:
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return _error(request, error.status_code, error.detail, param, code=code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _error(request, 500, f"the server failed: {type(error).__name__}")


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """Say which parameter is wrong; what stands in the body is not repeated."""
    found = error.errors()
    first = found[0]
    loc = first["loc"][1:]
    # a name of theirs may be long, or no text
    place = [str(part)[:100].encode("utf-8", "replace").decode() for part in loc]
    param = place[0] if loc and isinstance(loc[0], str) else None
    if first["type"] == "extra_forbidden":
        return _error(request, 400, f"{'.'.join(place)} is not supported", param)
    if first["type"] == "json_invalid":
        return _error(request, 400, "the body is not JSON")
    if param is None:
        return _error(
            request, 400, "the body must be a JSON object, sent as Content-Type: application/json"
        )
    same = dict.fromkeys(each["msg"] for each in found if each["loc"][:2] == first["loc"][:2])
    return _error(request, 400, f"{param}: {'; '.join(same)}", param)
