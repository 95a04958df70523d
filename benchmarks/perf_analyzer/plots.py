"""The plot of a sweep: throughput and latency over live requests, and over the offered rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PERCENTILES = {"p50_ms": ("p50", "-"), "p90_ms": ("p90", "--"), "p99_ms": ("p99", ":")}
COLOURS = {"grpc": "#1f77b4", "http": "#ff7f0e", "grpc-stream": "#2ca02c"}
Points = Sequence[Mapping[str, Any]]


def knee(points: Points) -> Mapping[str, Any]:
    """The point where throughput over average latency, Kleinrock's power, is greatest.

    Source: L. Kleinrock, Power and Deterministic Rules of Thumb for Probabilistic Problems in
    Computer Communications, ICC 1979.
    """
    return max(points, key=lambda point: point["images_per_second"] / point["average_ms"])


def draw(points: Points, title: str, file: Path) -> None:
    """Writes the three panels as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (throughput, latency, offered) = plt.subplots(1, 3, figsize=(13, 4))
    for protocol in COLOURS:
        line = _of(points, protocol, "concurrency")
        if line:
            x = [point["value"] for point in line]
            y = [point["images_per_second"] for point in line]
            throughput.plot(x, y, "o-", color=COLOURS[protocol], label=protocol)
            _latencies(latency, line, COLOURS[protocol], protocol)
    throughput.set(ylabel="images/s", ylim=(0, None))
    latency.set(ylabel="latency in ms", yscale="log")
    for panel in (throughput, latency):
        panel.set(xlabel="live requests", xscale="log")
        ticks = sorted({point["value"] for point in points if point["load"] == "concurrency"})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    if rates := _of(points, "grpc", "rate"):
        _latencies(offered, rates, COLOURS["grpc"], "grpc")
        bend = knee(rates)
        label = f"knee: {bend['value']:g}/s, p99 {bend['p99_ms']:.0f} ms"
        offered.axvline(bend["value"], color="grey", linewidth=1, label=label)
        offered.set(xlabel="offered requests/s (Poisson)", ylabel="latency in ms", ylim=(0, None))
    for panel in (throughput, latency, offered):
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _of(points: Points, protocol: str, load: str) -> list[Mapping[str, Any]]:
    found = [p for p in points if p["protocol"] == protocol and p["load"] == load]
    return sorted(found, key=lambda point: point["value"])


def _latencies(panel: Any, line: Points, colour: str, protocol: str) -> None:
    x = [point["value"] for point in line]
    for key, (name, style) in PERCENTILES.items():
        y = [point[key] for point in line]
        panel.plot(x, y, style, marker=".", color=colour, label=f"{protocol} {name}")
