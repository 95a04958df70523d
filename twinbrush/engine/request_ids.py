"""The names by which clients, logs and traces know a request."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable

LONGEST = 64  # characters of a client's id in logs and errors
MOST_NAMED = 8  # ids in one line of the log
NAMED = re.compile(r"request ids?=[\w.,-]+")
UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


def request_id_of(given: str) -> str:
    """A client's id, safe in a line of a log, or a new one where it gave none."""
    return UNSAFE.sub("_", given[:LONGEST]) if given else secrets.token_hex(6)


def named(ids: Iterable[str]) -> str:
    """Ids as lines of the log name them: `request id=a`, or `request ids=a,b`."""
    ids = list(dict.fromkeys(ids))
    shown = ",".join(ids[:MOST_NAMED]) + (",..." if len(ids) > MOST_NAMED else "")
    return f"request id{'s' if len(ids) > 1 else ''}={shown}"


class LineFormatter(logging.Formatter):
    """Every line of a record, also of its traceback, begins with a head and names its requests.

    Args:
        name: of the model that logs.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        first, *others = super().format(record).splitlines() or [""]
        ids = f"{match[0]}: " if (match := NAMED.search(first)) else ""
        lines = [first, *(ids + line for line in others)]
        return "\n".join(f"{self._name}: {record.levelname} {line}" for line in lines)
