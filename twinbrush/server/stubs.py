"""The Python stubs of one server: which models they run, and which of them has ended."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from twinbrush.server import processes
from twinbrush.server.processes import STUB


@dataclass(frozen=True)
class _Child:
    """A child process: the model its command line names, and its wait status once it ended."""

    model: str | None
    code: int | None


class Stubs:
    """The stubs among the children of `server`, a process id."""

    def __init__(self, server: int):
        self._server = server
        self._known: dict[int, str] = {}  # process id -> the model it runs

    @property
    def pids(self) -> list[int]:
        """Of the stubs that were seen."""
        return list(self._known)

    def dead(self, started: Iterable[str]) -> str | None:
        """A sentence on a stub that has ended, or None.

        Args:
            started: models for which the server has started a stub.
        """
        living = self._children()
        for pid, child in living.items():
            if child.code is not None:
                model = self._known.get(pid) or _without_stub(started, living)
                return f"the Python stub of {model} ended with {_how(child.code)}"
            if child.model:
                self._known[pid] = child.model
        for pid, model in self._known.items():
            if pid not in living:
                return f"the Python stub of {model} has ended"
        return None

    def _children(self) -> dict[int, _Child]:
        found = {}
        # The kernel's list can miss a child while others come and go: those known are looked up.
        for pid in {*processes.children(self._server), *self._known}:
            stat = processes.stat(pid)
            if stat is None or int(stat[1]) != self._server:
                continue  # it ended while we looked
            if stat[0] == "Z":
                found[pid] = _Child(None, int(stat[-1]))
            elif pid in self._known:
                found[pid] = _Child(self._known[pid], None)
            else:
                found[pid] = _Child(_model_of(pid), None)
        return found


def _without_stub(started: Iterable[str], living: dict[int, _Child]) -> str:
    """The models that have no stub although one was started: it ended before it was seen."""
    missing = set(started) - {child.model for child in living.values()}
    return " or ".join(sorted(missing)) or "a model"


def _model_of(pid: int) -> str | None:
    """The model that a stub runs; its instance is `MODEL_0_0` in its command line."""
    try:
        line = (processes.PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    arguments = line.decode("utf-8", "replace").split("\0")
    if not arguments[0].endswith(STUB):
        return None
    instances = [m[1] for a in arguments if (m := re.fullmatch(r"(\w+)_\d+_\d+", a))]
    return instances[-1] if instances else Path(arguments[0]).name


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)} ({signal.strsignal(os.WTERMSIG(status))})"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
