"""Clients in threads, each of which asks again when it is answered, and what they saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.faults.serving import Serving
from twinbrush_client import TwinbrushError

UNANSWERED = "no answer"  # of a request that nobody answered within its time
PATIENCE = 30.0  # seconds after which a request counts as unanswered


@dataclass(frozen=True)
class Outcome:
    """One request: when it was sent and answered (monotonic seconds), and its error or None."""

    sent: float
    answered: float
    error: str | None
    retry_after: float | None = None

    @property
    def seconds(self) -> float:
        return self.answered - self.sent


@dataclass
class Crowd:
    """Outcomes so far; from many threads."""

    outcomes: list[Outcome] = field(default_factory=list)

    def since(self, moment: float) -> list[Outcome]:
        """Those answered after a moment."""
        return [outcome for outcome in list(self.outcomes) if outcome.answered >= moment]

    def percentile_ms(self, share: float, since: float = 0.0) -> float:
        """Of the latency of requests without an error, in milliseconds."""
        seconds = [o.seconds for o in self.since(since) if o.error is None]
        return round(float(np.percentile(seconds, share)) * 1000, 1) if seconds else float("nan")

    def unanswered(self) -> int:
        return sum(outcome.error == UNANSWERED for outcome in self.outcomes)


def ask(send: Callable[[], object]) -> Outcome:
    """One request, sent by a call that returns or raises."""
    sent = time.monotonic()
    try:
        send()
    except TwinbrushError as error:
        now = time.monotonic()
        late = error.code == "DEADLINE_EXCEEDED" and now - sent >= PATIENCE
        return Outcome(sent, now, UNANSWERED if late else error.code, error.retry_after)
    return Outcome(sent, time.monotonic(), None)


@contextmanager
def crowd(server: Serving, clients: int, pause: float = 0.0, **fields) -> Iterator[Crowd]:
    """`clients` closed loops over connections of their own; `pause` seconds after an error."""
    seen, stopping = Crowd(), threading.Event()

    def run(number: int) -> None:
        with server.client(PATIENCE) as client:
            while not stopping.is_set():
                outcome = ask(lambda: client.generate("a red circle", seed=number, **fields))
                seen.outcomes.append(outcome)
                if outcome.error:
                    stopping.wait(pause)

    threads = [threading.Thread(target=run, args=[k], daemon=True) for k in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stopping.set()
        for thread in threads:
            thread.join(2 * PATIENCE)
