"""Loads: a closed loop of clients, and one client whose requests go to several sides in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Send = Callable[[int, Callable[[str | None], None]], None]
Call = Callable[[int], object]


@dataclass(frozen=True)
class Load:
    """What a loop of clients saw.

    Attributes:
        images_per_second: finished requests of one image over the whole time.
        p50, p95, p99: latency of a request in milliseconds.
    """

    images_per_second: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, latencies: Sequence[float], seconds: float) -> Load:
        """Of latencies in seconds, and the time in which all of them were."""
        p50, p95, p99 = (float(value) * 1000 for value in np.percentile(latencies, (50, 95, 99)))
        return cls(len(latencies) / seconds, p50, p95, p99)


def closed_loop(send: Send, concurrency: int, requests: int) -> Load:
    """Runs `requests` requests, `concurrency` at a time.

    Args:
        send: (number, done) starts a request and returns; `done` takes None or an error.

    Raises:
        RuntimeError: a request ended in an error.
    """
    lock = threading.Lock()
    finished = threading.Event()
    latencies: list[float] = []
    errors: list[str] = []
    sent = 0

    def next_request() -> None:
        nonlocal sent
        with lock:
            number, sent = sent, sent + 1
        if number >= requests:
            return
        started = time.perf_counter()

        def done(error: str | None) -> None:
            with lock:
                latencies.append(time.perf_counter() - started)
                if error is not None:
                    errors.append(error)
                if len(latencies) == requests or errors:
                    finished.set()
            next_request()

        send(number, done)

    began = time.perf_counter()
    for _ in range(min(concurrency, requests)):
        next_request()
    finished.wait()
    if errors:
        raise RuntimeError(errors[0])
    return Load.of(latencies, time.perf_counter() - began)


def in_turns(calls: Mapping[str, Call], requests: int) -> dict[str, Load]:
    """One client that sends each request to every side in turn and waits for its answer.

    All sides so meet the same machine, and a server that had the same pause before each request.

    Args:
        calls: (number) sends a request and returns when it is answered.
        requests: to each side, after one that is not counted.
    """
    latencies: dict[str, list[float]] = {side: [] for side in calls}
    order = list(calls)
    for number in range(requests + 1):
        for side in order:
            started = time.perf_counter()
            calls[side](number)
            latencies[side].append(time.perf_counter() - started)
        order.append(order.pop(0))
    return {side: Load.of(spent[1:], sum(spent[1:])) for side, spent in latencies.items()}
