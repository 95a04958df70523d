"""`python -m benchmarks.observing`: what recording metrics costs the engine.

The same engine in this process, with an observer that takes every value as the server's does, and
with none. Both sides take turns; the ratio is that of processor time an image, which other programs
disturb less than throughput, and the median over the turns.
"""

from __future__ import annotations

import json
import queue
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.load import closed_loop
from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from benchmarks.overhead import in_process
from twinbrush.engine.metrics import METRICS, Metric
from twinbrush.runtimes.onnx_runtime import LocalModels

GOAL = 0.99  # processor time without an observer over that with one


class Queued:
    """Keeps values as the server's observer does until its thread takes them."""

    def __init__(self) -> None:
        self.values: queue.SimpleQueue = queue.SimpleQueue()

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        if self.values.qsize() < 100_000:
            self.values.put((metric, value, labels))


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    turns: Annotated[int, typer.Option(min=1, help="How often each side runs.")] = 15,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Images a turn.")] = 96,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/observing.json"
    ),
) -> None:
    """Measures observed over unobserved throughput."""
    observer = Queued()
    models = LocalModels(repository)
    with ExitStack() as stack:
        plain = stack.enter_context(local_engine(repository, models))
        observed = stack.enter_context(local_engine(repository, models, observer=observer))
        sides = {"unobserved": in_process(plain), "observed": in_process(observed)}
        for send in sides.values():
            closed_loop(send, clients, clients)  # warm up
        before = observer.values.qsize()
        spent: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                began = time.process_time()
                closed_loop(sides[name], clients, requests)
                spent[name].append((time.process_time() - began) / requests * 1000)
        values = (observer.values.qsize() - before) / (turns * requests)
    ratios = [a / b for a, b in zip(spent["unobserved"], spent["observed"], strict=True)]
    summary = {
        "ratio": round(statistics.median(ratios), 4),
        "cpu_ms_an_image": {k: round(statistics.median(v), 2) for k, v in spent.items()},
        "values_an_image": round(values, 1),
        "cpu_ms_of_recording_an_image": round(values * _milliseconds_a_value(), 4),
    }
    write_result(
        out, "python -m benchmarks.observing", goals={"ratio": GOAL}, summary=summary,
        clients=clients, ratios=[round(ratio, 3) for ratio in ratios],
    )  # fmt: skip
    print(json.dumps(summary))


def _milliseconds_a_value(count: int = 20_000) -> float:
    """Processor time of one recorded value."""
    observer, metric = Queued(), METRICS[-1]
    began = time.process_time()
    for _ in range(count):
        observer.record(metric, 1.0)
    return (time.process_time() - began) / count * 1000


if __name__ == "__main__":
    typer.run(main)
