"""What stands before the routes: ids, the key, bounds on what comes in and how long it may take to
go out, and a line in the log for each request."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowspec.http.page import FILES
from flowspec.http.refusal import Refusal, body

STALLED = 60.0
"""A client that takes nothing for so many seconds is let go."""
OPEN = {"/health", *FILES}
"""These paths need no key."""
ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Guard:
    """An ASGI application around another one.

    `key` is what clients must show, None if nothing; `most` is the most bytes of a body; `log`
    takes the line of a request."""

    def __init__(
        self, app: ASGIApp, key: str | None, most: int, log: Callable[[str], None] | None = None
    ):
        self._app, self._key, self._most, self._log = app, key, most, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._most)
        try:
            refusal = self._refusal(visit.headers)
            if refusal is None or scope["path"] in OPEN:
                await self._app(scope, visit.receive, visit.send)
            else:
                told = body(refusal.status_code, refusal.detail, None, None, scope["path"])
                answer = JSONResponse(told, refusal.status_code, refusal.headers)
                await answer(scope, visit.receive, visit.send)
        except Exception:
            if not visit.stalled:
                raise
        finally:
            if self._log:
                self._log(visit.line())

    def _refusal(self, headers: Headers) -> Refusal | None:
        if self._key is None:
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        shown = bearer if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if hmac.compare_digest(shown.encode("latin-1"), self._key.encode()):
            return None
        told = {"WWW-Authenticate": "Bearer"}
        return Refusal(
            401, "the api key is missing or wrong: Authorization: Bearer KEY", headers=told
        )


class _Visit:
    """One request on its way in and out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int):
        self._scope, self._receive, self._send, self._most = scope, receive, send, most
        self.headers = Headers(scope=scope)
        asked = self.headers.get("x-request-id", "")
        self.id = asked if ID.fullmatch(asked) else uuid.uuid4().hex
        self.facts: dict[str, Any] = {}
        self.stalled = False
        """The client takes nothing."""
        scope["flowspec"] = self
        self._begun, self._status, self._size = time.monotonic(), 0, 0

    async def receive(self) -> Message:
        """Take in a piece of the body; raise Refusal if there is too much of it."""
        said = self.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self._most:
            raise self._too_large()
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._most} bytes")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        self.stalled = True
        with anyio.fail_after(STALLED):
            await self._send(message)
            self.stalled = False

    def line(self) -> str:
        """Return what is logged of it, as JSON."""
        client = self._scope.get("client")
        return json.dumps(
            {
                "time": round(time.time(), 3),
                "id": self.id,
                "client": client[0] if client else None,
                "method": self._scope["method"],
                "path": self._scope["path"],
                "status": self._status,
                "seconds": round(time.monotonic() - self._begun, 4),
                **self.facts,
            }
        )


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
