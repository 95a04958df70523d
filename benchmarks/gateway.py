"""`python -m benchmarks.gateway`: what the gateway's OpenAI door costs over gRPC directly.

One server, asked by gRPC and through the gateway in turns, so that both see the same machine: with
one client, request by request; with 16, in loads of some seconds. Both sides get PNG files; the
gateway's come as base64 in JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as grpc
import typer
import urllib3
from rich.console import Console
from rich.table import Table

from benchmarks.load import Call, Send, in_turns
from benchmarks.machine import write_result
from benchmarks.overhead import compare, new_prompt, running_server, through_grpc
from twinbrush.runtime_choice import Runtime
from twinbrush.server.addresses import chosen_ports
from twinbrush_client.wire import inputs

CLIENTS = 16
START_SECONDS = 60
GOALS = {"ratio_c16": 0.97, "p50_more_ms_c1": 3.0}
console = Console()


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    turns: Annotated[int, typer.Option(min=1, help="How often both sides run.")] = 7,
    requests: Annotated[int, typer.Option(min=1, help="Images a turn, a client.")] = 8,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/gateway.json"
    ),
) -> None:
    """Measures the gateway against gRPC."""
    server, gateway = chosen_ports("127.0.0.1", 0, 0)
    with ExitStack() as stack:
        client, _ = stack.enter_context(running_server(repository, Runtime.SERVED, server))
        stack.enter_context(_running_gateway(f"127.0.0.1:{server}", gateway))
        pool = urllib3.HTTPConnectionPool("127.0.0.1", gateway, maxsize=CLIENTS, block=True)
        call = functools.partial(_through_http, stack.enter_context(pool))
        http = stack.enter_context(_in_threads(call, CLIENTS))
        points = {
            "c1": _one_client(client, call, turns * requests * 2),
            "c16": compare(
                {"grpc": through_grpc(client), "gateway": http}, CLIENTS, turns, requests * CLIENTS
            ),
        }
    summary = {f"ratio_{name}": point["ratio"]["gateway"] for name, point in points.items()}
    for name, point in points.items():
        p50 = {side: load["p50"] for side, load in point["sides"].items()}
        summary[f"p50_more_ms_{name}"] = round(p50["gateway"] - p50["grpc"], 2)
    write_result(
        out, "python -m benchmarks.gateway", goals=GOALS, summary=summary, gateway_over_grpc=points
    )
    _show(points)
    print(json.dumps(summary))


@contextmanager
def _running_gateway(server: str, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "gateway", "--server", server, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the gateway did not start")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def _ready(port: int) -> bool:
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        url = f"http://127.0.0.1:{port}/health/ready"
        return urllib3.request("GET", url, retries=False, timeout=2).status == 200
    return False


def _one_client(client: grpc.InferenceServerClient, call: Call, requests: int) -> dict[str, Any]:
    """Both sides by a client that waits for each answer, request by request in turn."""

    def direct(number: int) -> None:
        fields = {"prompt": new_prompt(number), "seed": number, "image_format": "png"}
        client.infer("text_to_image", inputs(fields))

    loads = in_turns({"grpc": direct, "gateway": call}, requests)
    paces = {side: load.images_per_second for side, load in loads.items()}
    return {
        "ratio": {"gateway": round(paces["gateway"] / paces["grpc"], 3)},
        "sides": {
            side: {name: round(value, 2) for name, value in asdict(load).items()}
            for side, load in loads.items()
        },
    }


def _through_http(pool: urllib3.HTTPConnectionPool, number: int) -> None:
    body = json.dumps({"prompt": new_prompt(number), "seed": number})
    headers = {"content-type": "application/json"}
    answer = pool.urlopen("POST", "/v1/images/generations", body, headers, retries=False)
    if answer.status != 200:
        raise RuntimeError(answer.data.decode())


@contextmanager
def _in_threads(call: Call, clients: int) -> Iterator[Send]:
    """A sender with a thread for each client."""
    with ThreadPoolExecutor(clients) as threads:

        def send(number: int, done: Callable[[str | None], None]) -> None:
            def finish(future: Any) -> None:
                error = future.exception()
                done(str(error) if error else None)

            threads.submit(call, number).add_done_callback(finish)

        yield send


def _show(points: dict[str, dict]) -> None:
    table = Table(title="images a second, and p50 / p95 in ms", title_justify="left")
    for heading in ("clients", "gRPC", "gateway", "gateway over gRPC"):
        table.add_column(heading)
    for name, point in points.items():
        sides = point["sides"].values()
        cells = [f"{s['images_per_second']:.1f}   {s['p50']:.1f} / {s['p95']:.1f}" for s in sides]
        table.add_row(name.removeprefix("c"), *cells, f"{point['ratio']['gateway']:.3f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
