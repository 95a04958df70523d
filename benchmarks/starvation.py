"""`python -m benchmarks.starvation`: a popular size beside a crowd of rare ones.

Clients of one size, alone and beside clients that each have a size of their own. The engine runs
in this process on real ONNX files. Both settings take turns; figures are medians over the turns.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, Event
from twinbrush.engine.request import GenerationRequest
from twinbrush.runtimes.onnx_runtime import LocalModels

Size = tuple[int, int]  # width, height in pixels
GOAL = 0.5  # of the popular size's share of the work


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    popular: Annotated[int, typer.Option(min=1, help="Clients of the native size.")] = 16,
    crowd: Annotated[int, typer.Option(min=1, max=48, help="Clients of other sizes.")] = 40,
    turns: Annotated[int, typer.Option(min=1, help="How often each setting runs.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Measured time of a turn.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/starvation.json"
    ),
) -> None:
    """Measures what a crowd of sizes leaves to the popular one."""
    with local_engine(repository, LocalModels(repository)) as engine:
        side = engine.config.native_side
        native = [(side, side)] * popular
        odd = rare_sizes(engine.config, crowd)
        measure(engine, native, odd, seconds)  # warm up
        alone, beside = [], []
        for _ in range(turns):
            alone.append(measure(engine, native, [], seconds))
            beside.append(measure(engine, native, odd, seconds))
    summary = summarise(alone, beside, popular / (popular + crowd))
    write_result(
        out,
        "python -m benchmarks.starvation",
        checkpoint=engine.config.checkpoint,
        rare_sizes=[f"{width}x{height}" for width, height in odd],
        goals={"work_share_over_fair": GOAL, "pace_over_fair": GOAL},
        summary=summary,
        turns={"alone": alone, "beside": beside},
    )
    print(json.dumps(summary))


def rare_sizes(config: PipelineConfig, count: int) -> list[Size]:
    """`count` different sizes about as large as the native one, which is not among them."""
    native, step = config.native_side, config.side_multiple
    sides = range(native // 2 // step * step or step, min(2 * native, config.max_side) + 1, step)
    sizes = [size for size in itertools.product(sides, sides) if size != (native, native)]
    sizes.sort(key=lambda size: abs(math.log(size[0] * size[1] / native**2)))
    if len(sizes) < count:
        raise typer.BadParameter(f"must be at most {len(sizes)}", param_hint="--crowd")
    return sizes[:count]


def measure(engine: Engine, popular: Sequence[Size], rare: Sequence[Size], seconds: float) -> dict:
    """One turn: each client sends its next image when the last is done."""
    with clients(engine, [*popular, *rare]) as finished:
        time.sleep(seconds / 4)  # until every queue has settled
        began, skip = time.perf_counter(), len(finished)
        time.sleep(seconds)
        images = list(finished)[skip:]
        took = time.perf_counter() - began
    groups = {
        "popular": [image for image in images if image[0] < len(popular)],
        "rare": [image for image in images if image[0] >= len(popular)],
    }
    sizes = [*popular, *rare]
    area = {name: sum(math.prod(sizes[c]) for c, _ in group) for name, group in groups.items()}
    result: dict = {"popular_work_share": area["popular"] / sum(area.values())}
    for name, group in groups.items():
        if group:
            p50, p95 = np.percentile([latency for _, latency in group], (50, 95)) * 1000
            rate = {"images_per_second": len(group) / took, "p50_ms": p50, "p95_ms": p95}
            result |= {f"{name}_{key}": float(value) for key, value in rate.items()}
    return result


@contextmanager
def clients(engine: Engine, sizes: Sequence[Size]) -> Iterator[list[tuple[int, float]]]:
    """Closed loops of one client a size; yields the list of (client, latency) that grows.

    Raises:
        RuntimeError: a request ended in an error.
    """
    finished: list[tuple[int, float]] = []
    errors: list[str] = []
    stopping = threading.Event()
    ended = threading.Semaphore(0)

    def send(client: int, number: int) -> None:
        if stopping.is_set():
            ended.release()
            return
        width, height = sizes[client]
        fields = {
            "prompt": np.array([b"a large red circle left of a small blue square"], object),
            "seed": np.array([number]),
            "width": np.array([width]),
            "height": np.array([height]),
            "progress": np.array([False]),
        }
        started = time.perf_counter()

        def reply(event: Event) -> None:
            if not isinstance(event, End):
                return
            if event.error:
                errors.append(str(event.error))
                stopping.set()
            finished.append((client, time.perf_counter() - started))
            send(client, number + 1)

        engine.submit(GenerationRequest.parse(fields, engine.config), reply)

    for client in range(len(sizes)):
        send(client, 0)
    yield finished
    stopping.set()
    for _ in sizes:
        ended.acquire()
    if errors:
        raise RuntimeError(errors[0])


def summarise(alone: Sequence[dict], beside: Sequence[dict], fair: float) -> dict[str, float]:
    """Medians over the turns; `fair` is the popular size's part of the live images.

    `work_share_over_fair` compares its part of the pixels, `pace_over_fair` its images a second
    beside the crowd over those alone.
    """

    def median(turns: Sequence[dict], key: str) -> float:
        return round(statistics.median(turn[key] for turn in turns), 3)

    paces = [
        b["popular_images_per_second"] / a["popular_images_per_second"]
        for a, b in zip(alone, beside, strict=True)
    ]
    return {
        "work_share_over_fair": round(median(beside, "popular_work_share") / fair, 3),
        "pace_over_fair": round(statistics.median(paces) / fair, 3),
        **{f"alone_{key}": median(alone, key) for key in alone[0] if key.startswith("popular_i")},
        **{f"alone_{key}": median(alone, key) for key in alone[0] if key.endswith("ms")},
        **{
            f"beside_{key}": median(beside, key) for key in beside[0] if key != "popular_work_share"
        },
    }


if __name__ == "__main__":
    typer.run(main)
