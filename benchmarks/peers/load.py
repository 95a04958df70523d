"""Loads of blocking requests: a closed loop of clients, and Poisson arrivals. Knows no server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count as numbers
from itertools import islice
from typing import Any

import numpy as np

PROMPT = "a large red circle left of a small blue square, number {}"
SHORT = 4  # steps of a short request, at most
_NUMBERS = numbers()


@dataclass(frozen=True)
class Ask:
    """One request of one square picture."""

    prompt: str
    seed: int
    steps: int
    side: int


Send = Callable[[Ask], bytes]


@dataclass(frozen=True)
class Answered:
    """A request and its latency in seconds."""

    ask: Ask
    latency: float


def same(count: int, steps: int, side: int) -> list[Ask]:
    """Requests that differ in prompt and seed, from each other and from all before."""
    return [Ask(PROMPT.format(k), k, steps, side) for k in islice(_NUMBERS, count)]


def mixed(count: int, side: int, turn: int) -> list[Ask]:
    """Requests of 2, 4 and 20 steps at `side` and a quarter more, in an order by chance."""
    chance = np.random.default_rng(turn)
    steps = chance.choice((2, 4, 20), count, p=(0.5, 0.35, 0.15))
    sides = chance.choice((side, side * 5 // 4), count, p=(0.75, 0.25))
    steps[count // 4 :: max(1, count // 3)] = 20  # some in every run, however short
    return [
        replace(ask, steps=int(s), side=int(d))
        for ask, s, d in zip(same(count, SHORT, side), steps, sides, strict=True)
    ]


def closed_loop(send: Send, clients: int, asks: Sequence[Ask]) -> tuple[list[Answered], float]:
    """`clients` threads that each send their next request when the last is answered.

    Returns:
        The answers, and the seconds that all of it took.
    """
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda ask: _timed(send, ask), asks))
    return answers, time.perf_counter() - began


def open_loop(
    send: Send, rate: float, asks: Sequence[Ask], turn: int
) -> tuple[list[Answered], float]:
    """Requests at Poisson arrivals of `rate` a second, in a turn the same for every server.

    Returns:
        The answers, whose latency counts from the arrival, and the seconds that all of it took.
    """
    arrivals = np.cumsum(np.random.default_rng((turn, 1)).exponential(1 / rate, len(asks)))
    began = time.perf_counter()
    with ThreadPoolExecutor(len(asks)) as pool:
        futures = []
        for arrival, ask in zip(arrivals, asks, strict=True):
            threading.Event().wait(max(0.0, began + arrival - time.perf_counter()))
            futures.append(pool.submit(_timed, send, ask))
        answers = [future.result() for future in futures]
    return answers, time.perf_counter() - began


def _timed(send: Send, ask: Ask) -> Answered:
    started = time.perf_counter()
    if not send(ask).startswith(b"\x89PNG"):
        raise RuntimeError("the answer is no PNG")
    return Answered(ask, time.perf_counter() - started)


def describe(answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """Images a second, and latencies in seconds."""
    p50, p99 = np.percentile([answer.latency for answer in answers], (50, 99))
    return {
        "images": len(answers),
        "images_per_second": round(len(answers) / seconds, 3),
        "p50_s": round(float(p50), 3),
        "p99_s": round(float(p99), 3),
    }


def describe_mixed(answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """The same for all requests, and for short and long ones."""
    short = [answer for answer in answers if answer.ask.steps <= SHORT]
    long = [answer for answer in answers if answer.ask.steps > SHORT]
    parts = {"short": short, "long": long}
    return describe(answers, seconds) | {
        name: describe(part, seconds) for name, part in parts.items() if part
    }


def work(asks: Sequence[Ask], steps: int, side: int) -> float:
    """Mean work of requests, in requests of `steps` at `side`."""
    return float(np.mean([asdict(a)["steps"] * a.side**2 for a in asks])) / (steps * side**2)
