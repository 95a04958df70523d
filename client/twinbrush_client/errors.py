"""Errors of the client: which exception a status of the server becomes. Knows no gRPC types."""

from __future__ import annotations

import re
from typing import Any

SHOWN = 60  # characters of a value in a message
RETRY_AFTER = re.compile(r"(?:try again|retry) (?:in|after) ([0-9]+(?:\.[0-9]+)?) ?(ms|s)\b")
REQUEST_ID = re.compile(r"\(request id ([\w.-]+)\)$")
# Triton's words while its models are loaded or unloaded, which come with statuses of any kind.
NOT_READY = ("has no available versions", "Server not ready", "Server is stopping")
# Triton's streams carry messages without a status, and its models cannot set every status, so a
# server puts the status before its message.
PREFIX = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")


class TwinbrushError(Exception):
    """The server refused or ended a request.

    Attributes:
        code: gRPC's status name, such as `INVALID_ARGUMENT`, `UNAVAILABLE` or `INTERNAL`.
        retry_after: seconds after which the server suggests to try again, or None.
        request_id: by which the server's log names the request, or None.
    """

    def __init__(self, code: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.code, self.retry_after = code, retry_after
        named = REQUEST_ID.search(message)
        self.request_id = named[1] if named else None

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and for other processes, which make it anew of its arguments."""
        return type(self), (self.code, str(self), self.retry_after), vars(self)


class InvalidRequest(TwinbrushError, ValueError):
    """A field is unknown, has the wrong type, or a value that is not allowed."""


class QueueFull(TwinbrushError):
    """The server has as many requests as it takes; a later try may succeed."""


class Cancelled(TwinbrushError):
    """The request was cancelled, here or by its id."""


class DeadlineExceeded(TwinbrushError):
    """The request was not finished in time; the server ends its work."""


class ServerUnavailable(TwinbrushError):
    """No server answers, or it is starting or shutting down."""


class NothingListens(ServerUnavailable):
    """No server runs at an address of this machine, where one without TLS was sought."""


CLASSES: dict[str, type[TwinbrushError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "RESOURCE_EXHAUSTED": QueueFull,
    "CANCELLED": Cancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": ServerUnavailable,
}


def error_of(code: str, message: str, retry_after: float | None = None) -> TwinbrushError:
    """The exception of a status; a hint such as "try again in 2 s" becomes `retry_after`."""
    if match := PREFIX.match(message):
        code, message = match[1], message[match.end() :]
    if retry_after is None and (hint := RETRY_AFTER.search(message)):
        retry_after = float(hint[1]) / (1000 if hint[2] == "ms" else 1)
    if any(words in message for words in NOT_READY):
        code, message = "UNAVAILABLE", f"the server is starting or shutting down ({message})"
    kind = CLASSES.get(code, TwinbrushError)
    if kind is ServerUnavailable and "queue is full" in message:
        kind = QueueFull
    return kind(code, message, retry_after)


def invalid(name: str, value: object, allowed: str) -> InvalidRequest:
    """An invalid field; `allowed` says what is allowed, without a full stop."""
    text = f"{name}={shown(value)} is invalid: {allowed}."
    return InvalidRequest("INVALID_ARGUMENT", text)


def shown(value: object) -> str:
    """`repr` of a value for a message, of bounded length and cost."""
    if isinstance(value, str | bytes) and len(value) > SHOWN:
        return repr(value[:SHOWN]) + "..."
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return f"<an integer of {value.bit_length()} bits>"
    if isinstance(value, str | bytes | bool | int | float | None):
        return repr(value)
    return f"<{type(value).__name__}>"
