"""`python -m benchmarks.perf_analyzer`: the server under Triton's own perf_analyzer.

Sweeps live requests over gRPC, HTTP and the gRPC stream, then Poisson arrivals up to the rate that
the server can answer. Requests mix prompts, steps and sizes; each is one image. The stream's
requests ask for no progress, so the first response, which perf_analyzer times, is the picture.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write_result
from benchmarks.perf_analyzer.binary import find_binary
from benchmarks.perf_analyzer.measure import Door, PerfAnalyzerError, measure, run
from benchmarks.perf_analyzer.plots import draw, knee
from twinbrush.engine.config import ENGINE, PipelineConfig
from twinbrush.server.addresses import chosen_ports
from twinbrush.server.install import find_triton
from twinbrush.server.process import ServerOptions, TritonProcess

INPUTS = Path("benchmarks/inputs")
CONCURRENCY = (1, 2, 4, 8, 16, 32)
SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # of the best throughput, as offered rates
COLUMNS = (
    "protocol", "load", "value", "images_per_second", "average_ms", "p50_ms", "p90_ms", "p95_ms",
    "p99_ms", "client_send_ms", "network_ms", "client_receive_ms",
)  # fmt: skip
console = Console()


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    ports: Annotated[
        str,
        typer.Option(help="HTTP, gRPC and metrics port of a running server: 8000,8001,8002."),
    ] = "",
    host: Annotated[str, typer.Option(help="Of the running server.")] = "127.0.0.1",
    inputs: Annotated[
        str, typer.Option(help="Input file: mixed, or mixed-512 for 512 pixels and more.")
    ] = "mixed",
    window: Annotated[
        float, typer.Option(min=0.5, help="Seconds of a window; a load has three.")
    ] = 4.0,
    concurrency: Annotated[str, typer.Option(help="Live requests.")] = ",".join(
        map(str, CONCURRENCY)
    ),
    out: Annotated[Path, typer.Option(help="Result file; a CSV is written beside it.")] = Path(
        "benchmarks/results/perf_analyzer.json"
    ),
    plot: Annotated[Path, typer.Option(help="PNG.")] = Path("docs/images/perf_analyzer.png"),
) -> None:
    """Measures throughput and latency over live requests and over offered rates."""
    binary = find_binary()
    if binary is None:
        _end("perf_analyzer is not on PATH: run `make perf-analyzer`")
    if not (data := INPUTS / f"{inputs}.json").is_file():
        _end(f"--inputs {inputs!r} is invalid: {data} is not there")
    counts = _whole_numbers("--concurrency", concurrency)
    try:
        checkpoint = PipelineConfig.load(repository / ENGINE / "pipeline.json").checkpoint
        given = _whole_numbers("--ports", ports) if ports else None
        with _addresses(repository, host, given) as (http, grpc, metrics):
            doors = _doors(http, grpc, inputs)
            for door in doors:  # warm up
                measure(binary, door, "concurrency", 4, window)
            found = sweep(binary, doors, counts, window, f"http://{metrics}/metrics")
            refusal = _random_data(binary, grpc)
    except (PerfAnalyzerError, OSError, ValueError) as error:
        _end(str(error))
    bend = knee([point for point in found if point["load"] == "rate"])
    best = max((p for p in found if p["load"] == "concurrency"), key=_throughput)
    summary = {
        "images_per_second": best["images_per_second"],
        "at_concurrency": best["value"],
        "knee_rate": bend["value"],
        "knee_p50_ms": bend["p50_ms"],
        "knee_p99_ms": bend["p99_ms"],
    }
    write_result(
        out, "python -m benchmarks.perf_analyzer", perf_analyzer=binary.version(),
        checkpoint=checkpoint, inputs=str(data), windows=f"3 of {window:g} s",
        summary=summary, random_data=refusal, points=found,
    )  # fmt: skip
    _write_csv(out.with_suffix(".csv"), found)
    draw(found, f"{checkpoint}, {data.name}: mixed prompts, steps and sizes", plot)
    _show(found)
    print(json.dumps(summary))


def sweep(
    binary: Any, doors: Sequence[Door], counts: Sequence[int], window: float, metrics: str
) -> list[dict[str, Any]]:
    """Every door at every number of live requests, then the first one at Poisson rates."""
    found = []
    for count in counts:
        for door in doors:
            found.append(measure(binary, door, "concurrency", count, window, metrics))
            _report(found[-1])
    best = max(p["images_per_second"] for p in found if p["protocol"] == doors[0].name)
    for share in SHARES:
        rate = round(share * best, 1)
        found.append(measure(binary, doors[0], "rate", rate, window, metrics))
        _report(found[-1])
    return found


@contextmanager
def _addresses(
    repository: Path, host: str, ports: Sequence[int] | None
) -> Iterator[tuple[str, str, str]]:
    """HTTP, gRPC and metrics addresses of the running server, or of one of its own."""
    if ports is not None:
        if len(ports) != 3:
            raise ValueError(f"--ports has {len(ports)} numbers: it must have three")
        yield f"{host}:{ports[0]}", f"{host}:{ports[1]}", f"{host}:{ports[2]}"
        return
    http, grpc, metrics = chosen_ports("127.0.0.1", 0, 0, 0)
    options = ServerOptions(repository, http_port=http, grpc_port=grpc, metrics_port=metrics)
    with TritonProcess(find_triton(), options) as process:
        while not process.ready():
            process.check()
            time.sleep(0.1)
        yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}"


def _doors(http: str, grpc: str, inputs: str) -> list[Door]:
    unary, stream = INPUTS / f"{inputs}.json", INPUTS / f"{inputs}-stream.json"
    return [
        Door("grpc", "text_to_image", ("-i", "grpc", "--async"), grpc, unary),
        Door("http", "text_to_image", ("-i", "http", "--async"), http, unary),
        Door("grpc-stream", ENGINE.parent.name, ("-i", "grpc", "--streaming"), grpc, stream),
    ]


def _random_data(binary: Any, grpc: str) -> str:
    """What the server says to perf_analyzer's random inputs."""
    try:
        run(binary, ["-m", "text_to_image", "-i", "grpc", "-u", grpc, "--max-trials", "1"])
    except PerfAnalyzerError as error:
        return str(error).splitlines()[-1]
    return "accepted"


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        _end(f"{option} {text!r} is invalid: must be whole numbers above 0, with commas between")
    return numbers


def _end(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def _throughput(point: dict[str, Any]) -> float:
    return point["images_per_second"]


def _report(point: dict[str, Any]) -> None:
    console.print(
        f"{point['protocol']:12} {point['load']} {point['value']:g}:"
        f" {point['images_per_second']:.1f} images/s, p99 {point['p99_ms']:.0f} ms"
    )


def _write_csv(file: Path, points: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([point[name] for name in COLUMNS] for point in points)


def _show(points: Sequence[dict[str, Any]]) -> None:
    table = Table(title="perf_analyzer", title_justify="left")
    for heading in ("protocol", "load", "images/s", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(heading)
    for point in points:
        cells = [f"{point[key]:.0f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
        load = f"{point['load']} {point['value']:g}"
        table.add_row(point["protocol"], load, f"{_throughput(point):.1f}", *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
