"""One run of perf_analyzer at one load, and its CSV as numbers beside the server's own counters."""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.perf_analyzer.binary import Binary

LOADS = {"Concurrency": "concurrency", "Request Rate": "rate"}
SAMPLE = re.compile(r'^(\w+)\{[^}]*model="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
COUNTERS = {
    "nv_inference_exec_count": "calls",
    "nv_inference_queue_duration_us": "queue",
    "nv_inference_compute_infer_duration_us": "compute",
}
OVERSHOOT = 1.2  # perf_analyzer's windows are longer than it is told by this factor
WINDOWS = 3
LAST_LINES = 6  # of perf_analyzer's output in an error


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer failed; the message ends with what it said."""


@dataclass(frozen=True)
class Door:
    """How a client reaches the server.

    Attributes:
        name: of the protocol, in results.
        model: the front door.
        flags: of perf_analyzer.
        url: host and port.
        data: input file.
    """

    name: str
    model: str
    flags: tuple[str, ...]
    url: str
    data: Path


@dataclass(frozen=True)
class Point:
    """What one load gave; every request is one image.

    Attributes:
        load: "concurrency" (live requests) or "rate" (offered requests a second).
        value: of the load.
        images_per_second: answered requests.
        average_ms, p50_ms, p90_ms, p95_ms, p99_ms: latency of a request at the client.
        client_send_ms, network_ms, client_receive_ms: parts of the average that perf_analyzer
            gives; the front door answers later than its call returns, so `network_ms` holds the
            time in the engine.
    """

    load: str
    value: float
    images_per_second: float
    average_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    client_send_ms: float
    network_ms: float
    client_receive_ms: float


def parse_report(text: str) -> list[Point]:
    """The points of a CSV report, made with `-f FILE --verbose-csv`.

    Raises:
        ValueError: the text is no such report.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("WARNING")]
    rows = list(csv.DictReader(lines))
    heading = next((name for name in LOADS if rows and name in rows[0]), None)
    if heading is None:
        raise ValueError(f"is no report of perf_analyzer: {text[:60]!r}")
    try:
        return sorted(
            (_point(LOADS[heading], float(row[heading]), row) for row in rows),
            key=lambda point: point.value,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is no report with --verbose-csv: {error!r}") from error


def _point(load: str, value: float, row: dict[str, str]) -> Point:
    def ms(heading: str) -> float:
        return round(float(row[heading]) / 1000, 2)

    return Point(
        load=load,
        value=value,
        images_per_second=round(float(row["Inferences/Second"]), 2),
        average_ms=ms("Avg latency"),
        p50_ms=ms("p50 latency"),
        p90_ms=ms("p90 latency"),
        p95_ms=ms("p95 latency"),
        p99_ms=ms("p99 latency"),
        client_send_ms=ms("Client Send"),
        network_ms=ms("Network+Server Send/Recv"),
        client_receive_ms=ms("Client Recv"),
    )


def poisson_intervals(rate: float, seconds: float) -> list[int]:
    """Microseconds between the arrivals of a Poisson process, the same at every call.

    The process is conditioned on its number of arrivals, `rate * seconds`: perf_analyzer's own
    schedule of so few offers a rate that misses its name by a quarter.
    """
    count = max(1, round(rate * seconds))
    arrivals = np.sort(np.random.default_rng(0).uniform(0, count / rate, count - 1))
    gaps = np.diff(arrivals, prepend=0, append=count / rate)
    return [max(1, int(gap * 1e6)) for gap in gaps]


def load_flags(load: str, value: float, window: float, scratch: Path) -> list[str]:
    """The flags of a closed loop of `value` clients, or of Poisson arrivals at `value` a second."""
    if load == "concurrency":
        return ["--concurrency-range", f"{value:g}"]
    file = scratch / "poisson.txt"
    gaps = poisson_intervals(value, WINDOWS * OVERSHOOT * window)
    file.write_text("".join(f"{gap}\n" for gap in gaps))
    return ["--request-intervals", str(file)]


def measure(
    binary: Binary, door: Door, load: str, value: float, window: float, metrics: str | None = None
) -> dict[str, object]:
    """Runs perf_analyzer at one load, in three windows that it merges.

    Args:
        window: seconds of each.
        metrics: URL of the server's counters, or None.

    Returns:
        The point's fields, the door's name as `protocol`, the command, and as `server`, by model,
        calls, and milliseconds of queue and compute an image.

    Raises:
        PerfAnalyzerError: it failed, or a request did.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report = folder / "report.csv"
        command = [
            "perf_analyzer", "-m", door.model, *door.flags, "-u", door.url,
            "--input-data", str(door.data), *load_flags(load, value, window, folder),
            "--measurement-interval", f"{window * 1000:.0f}", "--max-trials", str(WINDOWS),
            "--stability-percentage", "999", "--verbose-csv",
        ]  # fmt: skip
        before = read_counters(metrics) if metrics else {}
        run(binary, [*command[1:], "-f", str(report)])
        after = read_counters(metrics) if metrics else {}
        (point,) = parse_report(report.read_text())
    result: dict[str, object] = {"protocol": door.name, **asdict(point), "value": value}
    result["command"] = " ".join(command).replace(f"{scratch}/", "")
    result["server"] = per_image(before, after, door.model)
    return result


def run(binary: Binary, flags: list[str]) -> str:
    """Runs perf_analyzer, and gives what it printed.

    Raises:
        PerfAnalyzerError: it failed, or a request did.
    """
    done = subprocess.run(
        [binary.path, *flags], env=binary.environment, capture_output=True, text=True
    )
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        last = "\n".join(line for line in said.splitlines() if line.strip())
        raise PerfAnalyzerError("\n".join(last.splitlines()[-LAST_LINES:]))
    return said


Counters = dict[str, dict[str, float]]


def read_counters(url: str) -> Counters:
    """Calls, and milliseconds of queue and compute, by model since the server's start."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return parse_counters(answer.read().decode())


def parse_counters(text: str) -> Counters:
    """See `read_counters`; from the text of `/metrics`."""
    found: Counters = {}
    for metric, model, value in SAMPLE.findall(text):
        if name := COUNTERS.get(metric):
            scale = 1 if name == "calls" else 1000
            found.setdefault(model, {})[name] = float(value) / scale
    return found


def per_image(before: Counters, after: Counters, door: str) -> Counters:
    """What each model spent between two readings, over the requests of the front door."""
    none: dict[str, float] = {}
    images = after.get(door, none).get("calls", 0) - before.get(door, none).get("calls", 0)
    return {
        model: {
            name: round((value - before.get(model, none).get(name, 0)) / images, 3)
            for name, value in counters.items()
        }
        for model, counters in after.items()
        if images > 0
    }
