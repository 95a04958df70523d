"""`python -m benchmarks.observing`: what recording metrics costs the engine.

The same engine in this process, with an observer that takes every value as the server's does, and
with none. Both sides take turns; the ratio is the median over the turns.
"""

from __future__ import annotations

import json
import queue
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from benchmarks.overhead import compare, in_process
from twinbrush.engine.metrics import Metric
from twinbrush.runtimes.onnx_runtime import LocalModels

GOAL = 0.99  # of the throughput without an observer


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
        result = compare(sides, clients, turns, requests)
    images = (turns * requests) + clients
    summary = {
        "ratio": result["ratio"]["observed"],
        "values_an_image": round(observer.values.qsize() / images, 1),
    }
    write_result(
        out, "python -m benchmarks.observing", goals={"ratio": GOAL}, summary=summary,
        clients=clients, **result,
    )  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
