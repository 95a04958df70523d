"""`python -m benchmarks.host`: whether the host holds an accelerator back.

The real server, with networks that wait as long as an H200 at half of its peak would compute Stable
Diffusion 1.5 at 512×512 in 4 steps. Reports images a second over what the waits allow, and what the
difference is made of: time without a call, calls of fewer rows, and the host's own CPU time.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as grpc
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.load import Load, Send, closed_loop
from benchmarks.machine import write_result
from benchmarks.overhead import new_prompt, running_server
from benchmarks.process_time import process_seconds
from benchmarks.waiting import FOLDER, WAITS, Accelerator, photographs
from benchmarks.waiting_repository import write_repository
from twinbrush.engine.capacity import decoder_pictures
from twinbrush.engine.images import encode, to_pixels
from twinbrush.runtime_choice import Runtime
from twinbrush_client.wire import inputs

CONCURRENCY = (1, 16, 64, 128, 256)
GOALS = {"c1": 0.85, "c16": 0.95, "c64": 0.98, "c128": 0.98, "c256": 0.97}
FORMATS = ("jpeg", "png")
STEPS, MAX_ROWS = 4, 32
console = Console()


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    turns: Annotated[int, typer.Option(min=1, help="How often each point is measured.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="Least time of a turn.")] = 3.0,
    clients: Annotated[
        list[int], typer.Option("--clients", min=1, help="Live requests; may be repeated.")
    ] = list(CONCURRENCY),  # noqa: B006
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/results/host.json"),
) -> None:
    """Measures the server around networks that wait."""
    points: dict[str, dict[str, Any]] = {}
    with servers(repository) as sides:
        for image_format in FORMATS:
            for count in clients:
                name = f"{image_format}_c{count}"
                point = track(range(turns), f"{name:>10}", transient=True)
                points[name] = measure(sides, image_format, count, seconds, point)
    summary = {
        f"{side}_{name}": point["share_of_limit"]
        for name, sides in points.items()
        for side, point in sides.items()
    }
    waits = {model: {k: 1000 * v for k, v in asdict(wait).items()} for model, wait in WAITS.items()}
    write_result(
        out, "python -m benchmarks.host",
        waits_ms=waits, steps=STEPS, goals=GOALS, summary=summary, files=file_times(),
        points=points,
    )  # fmt: skip
    show(points)
    print(json.dumps(summary))


def limit(clients: int) -> float:
    """Images a second that the waits allow, with calls as full as that many clients can fill."""
    rows = min(clients, MAX_ROWS)
    pictures = min(clients, decoder_pictures(MAX_ROWS))
    seconds = STEPS * WAITS["unet"].seconds(rows) / rows
    seconds += WAITS["vqgan_decoder"].seconds(pictures) / pictures
    texts = sum(WAITS[model].seconds(rows) for model in ("clip_text", "bert", "fusion"))
    return 1 / (seconds + texts / rows)


def file_times() -> dict[str, dict[str, float]]:
    """CPU time and size of the file of a picture, and of a PNG as Pillow writes it."""
    pixels = to_pixels(photographs(1)[0])

    def by_pillow() -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", compress_level=1)
        return file.getvalue()

    writers = {name: partial(encode, pixels, name) for name in FORMATS}
    found = {}
    for name, write in {**writers, "png by Pillow, level 1": by_pillow}.items():
        times = []
        for _ in range(15):
            started = time.thread_time()
            size = len(write())
            times.append(1000 * (time.thread_time() - started))
        found[name] = {"cpu_ms": round(statistics.median(times), 2), "kb": round(size / 1000, 1)}
    return found


class Side:
    """One server, its accelerator and its processes."""

    def __init__(self, client: grpc.InferenceServerClient, server: int, accelerator: Accelerator):
        self.client, self.server, self.accelerator = client, server, accelerator

    def send(self, image_format: str) -> Send:
        def send(number: int, done: Callable[[str | None], None]) -> None:
            fields = {"prompt": new_prompt(number), "seed": number, "image_format": image_format}
            self.client.async_infer(
                "text_to_image",
                inputs({**fields, "steps": STEPS}),
                lambda result, error: done(str(error) if error else None),
                client_timeout=120,
            )

        return send


@contextmanager
def servers(repository: Path) -> Iterator[dict[str, Side]]:
    """A server of each runtime, both at once; idle ones cost nothing."""
    with ExitStack() as stack:
        sides = {}
        for runtime in Runtime:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            made = write_repository(repository, folder / "repository", runtime)
            accelerator = Accelerator(folder)
            os.environ[FOLDER] = str(folder)
            client, server = stack.enter_context(running_server(made, runtime))
            sides[str(runtime)] = Side(client, server, accelerator)
        yield sides


def measure(
    sides: dict[str, Side], image_format: str, clients: int, seconds: float, turns: Any
) -> dict[str, dict[str, Any]]:
    """Medians over turns, in which the sides take turns."""
    images = max(2 * clients, round(seconds * limit(clients)))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for side in sides.values():  # warm up
        closed_loop(side.send(image_format), clients, clients)
    for turn in turns:
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(turn_of(sides[name], image_format, clients, images))
    return {name: medians(results) for name, results in found.items()}


def turn_of(side: Side, image_format: str, clients: int, images: int) -> dict[str, Any]:
    """One closed loop, and what it did to the accelerator and the processes."""
    counts, cpu = side.accelerator.counts(), process_seconds(side.server)
    load: Load = closed_loop(side.send(image_format), clients, images)
    after, cpu_after = side.accelerator.counts(), process_seconds(side.server)
    spent = {model: after[model] - counts[model] for model in after}
    elapsed = images / load.images_per_second
    held = sum(count.seconds for count in spent.values())
    return {
        "images_per_second": load.images_per_second,
        "share_of_limit": load.images_per_second / limit(clients),
        "p50_ms": load.p50,
        "p99_ms": load.p99,
        "accelerator_busy": held / elapsed,
        "held_over_ideal": held / images * limit(clients),
        "unet_rows_a_call": spent["unet"].rows / spent["unet"].calls,
        "pictures_a_decoder_call": spent["vqgan_decoder"].rows / spent["vqgan_decoder"].calls,
        "cpu_ms_an_image": {
            name: 1000 * (after - cpu.get(name, 0.0)) / images for name, after in cpu_after.items()
        },
    }


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure, rounded."""
    made = {}
    for key, value in results[0].items():
        values = [result[key] for result in results]
        made[key] = medians(values) if isinstance(value, dict) else _rounded(values)
    return made


def _rounded(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def show(points: dict[str, dict[str, Any]]) -> None:
    """Prints the points as a table."""
    table = Table(title="the host beside an accelerator", title_justify="left")
    for heading in ("", "side", "images/s", "of the limit", "goal", "p50 / p99 ms", "busy", "rows"):
        table.add_column(heading)
    for name, sides in points.items():
        for side, point in sides.items():
            goal = str(GOALS.get(name.rpartition("_")[2], ""))
            latency = f"{point['p50_ms']:.0f} / {point['p99_ms']:.0f}"
            table.add_row(
                name, side, f"{point['images_per_second']:.1f}", f"{point['share_of_limit']:.2f}",
                goal, latency, f"{point['accelerator_busy']:.2f}",
                f"{point['unet_rows_a_call']:.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
