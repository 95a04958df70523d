"""The launcher's and the server's log: as text or as JSON, and what it says of failed loads."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Literal

LogFormat = Literal["text", "json"]
LOAD_FAILURE = re.compile(
    r"(?:failed to load '([^']+)' version \d+|Poll failed for model directory '([^']+)'): "
    r"(.*?)(\\n\\nAt:|\"?$)"
)
SYNTAX_ERROR = re.compile(r"\[libprotobuf ERROR .*?\] (.*)")  # a line before its poll failure
WRONG_FLAG = re.compile(r"(unrecognized option|option .* requires an argument|Bad option:) .*")
INSTANCE = re.compile(r"TRITONBACKEND_ModelInstanceInitialize: (\w+)_\d+_\d+ ")
TABLE = re.compile(r"[+|]|$")
CHATTER = re.compile(r"[IW]\d{4} |Signal \(|[+|]|$")
TRITON = re.compile(r"([IWEF])\d{4} [\d:.]+ \d+ (.*)")
MODEL = re.compile(r"([\w.-]+): (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)")
REQUEST_ID = re.compile(r"request[ _]ids?[:= ]+['\"<]?([\w.,-]+)")
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}
TAIL_LINES = 200


class Log:
    """Writes lines as text, or each as one JSON object; a line that cannot be written is lost.

    An object has `time` (UTC), `level`, `source` (launcher, triton or a model), `message` and,
    where the message names one, `request_id`; several are joined by commas.
    """

    def __init__(self, form: LogFormat = "text"):
        self._json = form == "json"

    def say(self, text: str) -> None:
        """A message of the launcher."""
        self._write(sys.stdout, "info", "launcher", text, f"twinbrush: {text}")

    def complain(self, text: str) -> None:
        """An error of the launcher."""
        self._write(sys.stderr, "error", "launcher", text, f"twinbrush: {text}")

    def relay(self, line: str) -> None:
        """A line of the server or of a model."""
        self._write(sys.stderr, *parse(line), line)

    def take_tracebacks(self) -> None:
        """Exceptions that nobody handles, of any thread, become entries too; as JSON only."""
        if self._json:
            sys.excepthook = lambda kind, error, trace: self._crash(error)
            threading.excepthook = lambda args: self._crash(args.exc_value)

    def _crash(self, error: BaseException | None) -> None:
        text = "".join(traceback.format_exception(error)).rstrip()
        self._write(sys.stderr, "critical", "launcher", text, text)

    def _write(self, stream: IO[str], level: str, source: str, message: str, line: str) -> None:
        """Writes a line, or its parts as JSON; the server lives on where it cannot be written."""
        if self._json:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            entry = {"time": now, "level": level, "source": source, "message": message}
            if found := REQUEST_ID.search(message):
                entry["request_id"] = found[1].strip(",.")
            line = json.dumps(entry)
        with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that left
            print(line, file=stream, flush=True)


def parse(line: str) -> tuple[str, str, str]:
    """Level, source and message of a line of the server's output."""
    if match := TRITON.match(line):
        text = match[2]
        # file.cc:12] "message" where the server quotes it
        text = text.partition("] ")[2] or text
        with contextlib.suppress(ValueError, RecursionError):
            quoted = json.loads(text)
            text = quoted if isinstance(quoted, str) else text
        return LEVELS[match[1]], "triton", text
    if match := MODEL.match(line):
        return match[2].lower(), match[1], match[3]
    return "info", "triton", line


def is_warning(line: str) -> bool:
    """Whether a line is a model's, of a warning or worse."""
    match = MODEL.match(line)
    return match is not None and match[2] not in ("DEBUG", "INFO")


class ServerOutput:
    """The last lines of a server's output, and what they say of its models.

    Args:
        rename: applied to every line, such as to put a path back that was shortened.
    """

    def __init__(self, rename: Callable[[str], str] = lambda line: line):
        self._rename = rename
        self.lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.started_models: set[str] = set()  # for which the server has started a stub
        self.wrong_flag = ""  # what the server says of a flag, before its long list of all

    def add(self, raw: bytes) -> str:
        line = self._rename(raw.decode("utf-8", "replace").rstrip())
        self.lines.append(line)
        if match := INSTANCE.search(line):
            self.started_models = self.started_models | {match[1]}
        elif match := WRONG_FLAG.search(line):
            self.wrong_flag = match[0]
        return line

    def load_failures(self) -> dict[str, str]:
        """The models that the server could not load, each with its reason."""
        failures, syntax_error = {}, ""
        for line in list(self.lines):
            if match := SYNTAX_ERROR.search(line):
                syntax_error = f" ({match[1]})"
            elif match := LOAD_FAILURE.search(line):
                reason = match[3].replace("\\n", " ").strip()
                failures[match[1] or match[2]] = reason + syntax_error
                syntax_error = ""
        return failures

    def tail(self) -> str:
        return "\n".join([line for line in list(self.lines) if not TABLE.match(line)][-12:])
