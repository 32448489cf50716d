"""A refusal is an answer that is an error, in the words of whichever interface was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""This maps a status to the type of the error; every other one is an api_error."""


class Refusal(HTTPException):
    """The status, a sentence for the person at the client, and the parameter that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


def body(status: int, message: str, param: str | None, code: str | None, path: str) -> Any:
    """Return the JSON of an error as the interface at this path words it."""
    kind = KINDS.get(status, "api_error")
    if path == "/v1/messages":
        return {"type": "error", "error": {"type": kind, "message": message}}
    error = {"message": message, "type": kind, "param": param, "code": code or status}
    return {"error": error}
