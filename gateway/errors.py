"""`ApiError`: what a door refuses, in OpenAI's and in A1111's form. Knows no routes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from twinbrush_client import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ServerUnavailable,
    TwinbrushError,
)

A1111 = ("/sdapi/", "/internal/", "/controlnet/")  # its paths, and those of its page and extension
CLIENT_LEFT = 499  # nginx's status of a request whose client has gone; nobody reads it
FIELD = re.compile(r"(\w+)=")
# Of each kind of error of a server: HTTP's status, OpenAI's type, and its code.
KINDS: dict[type[TwinbrushError], tuple[int, str, str]] = {
    InvalidRequest: (400, "invalid_request_error", "invalid_value"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    ServerUnavailable: (503, "server_error", "server_unavailable"),
    DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
    Cancelled: (CLIENT_LEFT, "server_error", "cancelled"),
}


STATUSES = {
    400: "A field is unknown, or its value is not allowed.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, file or path.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A limit is reached, or the queue is full.",
    500: "A fault; the log has the reason.",
    503: "No server answers, or the gateway shuts down.",
    504: "The request was not finished in time.",
}


class ApiError(Exception):
    """A request that ends in an error.

    Attributes:
        status: of HTTP.
        message: what is wrong, the value, and what is allowed.
        param: the field at fault, or None.
        code: a word for programs, or None.
        type: OpenAI's group of errors.
        retry_after: seconds after which to try again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",  # noqa: A002  OpenAI's word
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type, self.retry_after = type, retry_after

    @classmethod
    def of(cls, error: TwinbrushError, names: Mapping[str, str] | None = None) -> ApiError:
        """An error of a server; `names` are this door's names of its fields."""
        status, group, code = KINDS.get(type(error), (500, "server_error", "server_error"))
        field = FIELD.match(str(error)) if status == 400 else None
        text, param = str(error), None
        if field:
            param = (names or {}).get(field[1], field[1])
            text = param + text.removeprefix(field[1])
        after = error.retry_after
        if after is None and status in (429, 503):
            after = 1.0
        return cls(status, text, param=param, code=code, type=group, retry_after=after)

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(1000 * self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def response(self, path: str) -> JSONResponse:
        """In the form that clients of this path read."""
        body = self.body()
        if path.startswith(A1111):
            body = {
                "error": self.code or self.type,
                "detail": self.message,
                "body": "",
                "errors": self.message,
            }
        return JSONResponse(body, self.status, self.headers)


def invalid(param: str, value: object, allowed: str) -> ApiError:
    """A value that is not allowed; `allowed` says what is, without a full stop."""
    return ApiError(
        400, f"{param}={shown(value)} is invalid: {allowed}.", param=param, code="invalid_value"
    )


def unknown(param: str, names: Mapping[str, Any] | None = None) -> ApiError:
    """A field that this door does not have."""
    text = f"Unknown parameter: {shown(param)}."
    if names:
        text += f" The parameters are {', '.join(names)}."
    return ApiError(400, text, param=param, code="unknown_parameter")


def shown(value: object, most: int = 60) -> str:
    """`repr` of a value, of bounded length."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
