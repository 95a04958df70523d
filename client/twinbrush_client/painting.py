"""Paints many prompts at once and shows it: a bar for each image, previews, lines for files."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.segment import ControlType, Segment

from twinbrush_client.client import MAX_IN_FLIGHT, Client, Stream
from twinbrush_client.errors import TwinbrushError
from twinbrush_client.terminal import half_blocks, protocol
from twinbrush_client.wire import Event, Picture, Preview


@dataclass(frozen=True)
class Job:
    """One prompt and its fields; `number` counts them."""

    number: int
    prompt: str
    fields: dict[str, Any]


def events(client: Client, jobs: Sequence[Job]) -> Iterator[tuple[Job, Event]]:
    """The events of all jobs as they come; leaving it cancels what is left.

    Raises:
        TwinbrushError: a job failed; the others are cancelled.
    """
    arrived: queue.SimpleQueue[tuple[Job, Event | None, TwinbrushError | None]]
    arrived = queue.SimpleQueue()
    waiting, live = deque(jobs), dict[int, Stream]()

    def follow(job: Job, stream: Stream) -> None:
        try:
            for event in stream:
                arrived.put((job, event, None))
            arrived.put((job, None, None))
        except TwinbrushError as error:
            arrived.put((job, None, error))

    def begin() -> None:
        job = waiting.popleft()
        live[job.number] = stream = client.stream(job.prompt, **job.fields)
        threading.Thread(target=follow, args=[job, stream], daemon=True).start()

    try:
        while live or waiting:
            while waiting and len(live) < MAX_IN_FLIGHT:
                begin()
            job, event, error = arrived.get()
            if error is not None:
                raise error
            if event is None:
                del live[job.number]
            else:
                yield job, event
    finally:
        for stream in live.values():
            stream.cancel()


class Display:
    """The bars of live images, and the last preview, below the lines that are printed."""

    def __init__(self, console: Console, previews: bool):
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), TaskProgressColumn())
        self._console = console
        self._bars = Progress(*columns, console=console)
        self._live = Live(self._bars, console=console, transient=True)
        self._tasks: dict[tuple[int, int], TaskID] = {}
        self._previews = previews and console.is_terminal
        self._draw = protocol(os.environ)

    def show(self, job: Job, event: Event) -> None:
        key = job.number, event.index
        if isinstance(event, Picture):
            if (task := self._tasks.pop(key, None)) is not None:
                self._bars.remove_task(task)
            return
        if key not in self._tasks:
            name = f"{job.prompt[:24]} {event.index + 1}"
            self._tasks[key] = self._bars.add_task(name, total=event.total_steps)
        self._bars.update(self._tasks[key], completed=event.step)
        if isinstance(event, Preview) and self._previews:
            self._show_preview(event)

    def _show_preview(self, event: Preview) -> None:
        if self._draw is None:
            self._live.update(Group(half_blocks(event.image), self._bars))
        else:
            self._console.print(_Raw(self._draw(event.image)))

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()


@dataclass(frozen=True)
class _Raw:
    """A terminal's own sequence, which rich must neither measure nor change."""

    sequence: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield Segment(self.sequence, None, [(ControlType.BELL,)])
        yield Segment.line()
