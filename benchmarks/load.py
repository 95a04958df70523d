"""A closed loop of clients: each sends its next request when its last one is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Send = Callable[[int, Callable[[str | None], None]], None]


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
    p50, p95, p99 = (float(value) * 1000 for value in np.percentile(latencies, (50, 95, 99)))
    return Load(requests / (time.perf_counter() - began), p50, p95, p99)
