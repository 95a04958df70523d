"""`python -m benchmarks.overhead`: what the server costs, and what step batching brings.

The same engine on the same ONNX files: alone in this process, against through a server and gRPC,
with its networks served by Triton and with its networks in its own process; and with calls shared
between requests, against deterministic ones, each in calls of its own. The sides of a comparison
take turns, and ratios are medians over the turns. `--beside` measures one more server in the same
turns: another version on the same checkpoint, say.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as grpc
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load import Load, Send, closed_loop
from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, Event
from twinbrush.engine.request import GenerationRequest
from twinbrush.runtime_choice import Runtime
from twinbrush.runtimes.onnx_runtime import LocalModels
from twinbrush.server.addresses import chosen_ports
from twinbrush.server.install import find_triton
from twinbrush.server.process import ServerOptions, TritonProcess
from twinbrush_client.wire import inputs

CONCURRENCY = (1, 4, 16, 64)
GOALS = {
    **{f"{Runtime.IN_PROCESS}_c{clients}": 0.97 for clients in CONCURRENCY},
    "shared_c16": 1.8,
}
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_COUNTER = itertools.count()
console = Console()


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    turns: Annotated[int, typer.Option(min=1, help="How often both sides of each ratio run.")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Images a turn, at concurrency 1.")] = 12,
    beside: Annotated[str, typer.Option(help="HOST:PORT of one more server, over gRPC.")] = "",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/overhead.json"
    ),
) -> None:
    """Measures servers against the engine alone, and shared against unshared UNet calls."""
    with ExitStack() as stack:
        models = LocalModels(repository)
        engine = stack.enter_context(local_engine(repository, models))
        clients = {
            str(runtime): stack.enter_context(running_server(repository, runtime))[0]
            for runtime in Runtime
        }
        if beside:
            clients["beside"] = stack.enter_context(grpc.InferenceServerClient(beside))
        servers = {runtime: through_grpc(client) for runtime, client in clients.items()}
        sides = {"engine": in_process(engine), **servers}
        points = {f"c{c}": compare(sides, c, turns, max(requests, 2 * c)) for c in CONCURRENCY}
        sides = {
            "unshared": in_process(engine, deterministic=True),
            "shared": in_process(engine),
        }
        batching = compare(sides, 16, turns, 32)
        profile = _profile(clients[Runtime.SERVED], requests)
    summary = {
        f"{side}_{name}": ratio
        for name, point in (*points.items(), ("c16", batching))
        for side, ratio in point["ratio"].items()
    }
    defaults = asdict(engine.config.defaults)
    write_result(
        out,
        "python -m benchmarks.overhead" + (f" --beside {beside}" if beside else ""),
        checkpoint=engine.config.checkpoint,
        request=defaults | {"width": engine.config.native_side, "prompts": "all different"},
        goals=GOALS,
        summary=summary,
        servers_over_engine=points,
        shared_over_unshared=batching,
        served_profile_c1_ms_per_image=profile,
    )
    _show(points, batching, profile)
    print(json.dumps(summary))


@contextmanager
def running_server(
    repository: Path, runtime: Runtime, grpc_port: int = 0
) -> Iterator[tuple[grpc.InferenceServerClient, int]]:
    """A server of its own: a client of it, and its process id. A port of 0 is chosen."""
    http, grpc_port, metrics = chosen_ports("127.0.0.1", 0, grpc_port, 0)
    options = ServerOptions(
        repository, http_port=http, grpc_port=grpc_port, metrics_port=metrics, runtime=runtime
    )
    with TritonProcess(find_triton(), options) as process:
        while not process.ready():
            process.check()
            time.sleep(0.1)
        with grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
            yield client, process.pid


def new_prompt(number: int) -> str:
    """Never the same twice, so that no prompt comes from the cache."""
    a, b = COLOURS[number % 8], COLOURS[number // 8 % 8]
    return f"a large {a} circle left of a small {b} square {next(_COUNTER)}"


def in_process(engine: Engine, deterministic: bool = False) -> Send:
    def send(number: int, done: Callable[[str | None], None]) -> None:
        fields = {
            "prompt": np.array([new_prompt(number).encode()], object),
            "seed": np.array([number]),
            "image_format": np.array([b"png"], object),
            "progress": np.array([False]),
            "deterministic": np.array([deterministic]),
        }

        def reply(event: Event) -> None:
            if isinstance(event, End):
                done(str(event.error) if event.error else None)

        engine.submit(GenerationRequest.parse(fields, engine.config), reply)

    return send


def through_grpc(client: grpc.InferenceServerClient) -> Send:
    def send(number: int, done: Callable[[str | None], None]) -> None:
        fields = inputs({"prompt": new_prompt(number), "seed": number, "image_format": "png"})
        client.async_infer(
            "text_to_image",
            fields,
            lambda result, error: done(str(error) if error else None),
            client_timeout=120,  # an error, should the server be lost
        )

    return send


def compare(sides: dict[str, Send], concurrency: int, turns: int, requests: int) -> dict:
    """All sides in turn; the ratios are over the first side, in images a second."""
    loads: dict[str, list[Load]] = {name: [] for name in sides}
    for send in sides.values():  # warm up
        closed_loop(send, concurrency, concurrency)
    for turn in range(turns):
        order = list(sides)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            loads[name].append(closed_loop(sides[name], concurrency, requests))
    paces = {name: [load.images_per_second for load in side] for name, side in loads.items()}
    base, *others = sides
    ratios = {
        name: [round(b / a, 3) for a, b in zip(paces[base], paces[name], strict=True)]
        for name in others
    }
    return {
        "ratio": {name: statistics.median(side) for name, side in ratios.items()},
        "ratios": ratios,
        "sides": {name: _medians(side) for name, side in loads.items()},
    }


def _medians(loads: list[Load]) -> dict[str, float]:
    columns = {key: [asdict(load)[key] for load in loads] for key in asdict(loads[0])}
    return {key: round(statistics.median(values), 2) for key, values in columns.items()}


def _profile(client: grpc.InferenceServerClient, requests: int) -> dict[str, dict[str, float]]:
    """Where the server's time goes at concurrency 1, from its own counters."""

    def counters() -> dict[str, dict[str, int]]:
        answer: Any = client.get_inference_statistics()
        return {
            model.name: {
                "calls": model.execution_count,
                "compute": model.inference_stats.compute_infer.ns,
                "in_and_out": model.inference_stats.compute_input.ns
                + model.inference_stats.compute_output.ns,
                "queue": model.inference_stats.queue.ns,
            }
            for model in answer.model_stats
        }

    before = counters()
    load = closed_loop(through_grpc(client), 1, requests)
    profile = {"client": {"total": round(load.p50, 2)}}
    for model, after in counters().items():
        spent = {key: after[key] - before[model][key] for key in after}
        calls = round(spent.pop("calls") / requests, 2)
        times = {key: round(ns / 1e6 / requests, 3) for key, ns in spent.items()}
        profile[model] = {"calls": calls} | times
    return profile


def _show(points: dict, batching: dict, profile: dict) -> None:
    table = Table(title="images a second, p50 / p95 in ms", title_justify="left")
    for heading in ("", "side", "images/s", "p50 / p95", "over the first", "goal"):
        table.add_column(heading)
    for name, point in (*points.items(), ("c16", batching)):
        for side, load in point["sides"].items():
            pace = f"{load['images_per_second']:.1f}"
            latency = f"{load['p50']:.0f} / {load['p95']:.0f}"
            ratio, goal = point["ratio"].get(side, ""), GOALS.get(f"{side}_{name}", "")
            table.add_row(name, side, pace, latency, str(ratio), str(goal))
    console.print(table)
    console.print("ms an image at concurrency 1, from the server's counters:")
    for model, times in profile.items():
        console.print("  ", model, times)


if __name__ == "__main__":
    typer.run(main)
