"""`python -m benchmarks.peers`: Twinbrush beside other ways to serve the same checkpoint.

Random weights of Stable Diffusion 1.5's size (LCM, 4 steps, 256x256), or of a fraction of it. One
server runs at a time, with all cores, and every round starts them anew: closed loops in the first
round, Poisson arrivals of mixed requests in the second, which goes through the peers backwards.
Pictures are not compared here: `benchmarks.fullsize` does that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.machine import write_result
from benchmarks.peers.load import (
    closed_loop,
    describe,
    describe_mixed,
    mixed,
    open_loop,
    same,
    work,
)
from benchmarks.peers.peers import PEERS, Peer, running
from benchmarks.peers.prepare import prepare

STEPS, SIDE = 4, 256
CLIENTS = (1, 4, 8)
LOAD = 0.7  # of the best peer's throughput, as the rate of mixed requests
GOALS = {"c1": 1.0, "c8": 1.3, "short_p99": 2.0}
OURS = "twinbrush"
console = Console()


def main(
    size: Annotated[str, typer.Option(help="full, or small: a fraction of the widths.")] = "full",
    folder: Annotated[
        Path | None, typer.Option(help="Keeps the checkpoint and the exported files.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of a closed loop, at least.")] = 8,
    requests: Annotated[int, typer.Option(min=4, help="Mixed requests.")] = 16,
    only: Annotated[str, typer.Option(help="Peers, with commas between.")] = "",
    note: Annotated[str, typer.Option(help="On the machine, for the result file.")] = "",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/results/peers.json"),
) -> None:
    """Measures throughput, latency, memory and start-up of every peer."""
    if size not in ("full", "small"):
        sys.exit(f"error: --size {size!r} is invalid: must be full or small")
    peers = [peer for peer in PEERS if not only or peer.name in only.split(",")]
    if not peers:
        sys.exit(f"error: --only {only!r} is invalid: {', '.join(p.name for p in PEERS)}")
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        made = folder or Path(scratch, "made")
        prepare(made, size)
        results, rate, asks = measure(peers, made, Path(scratch), images, requests)
    summary = summarise(results)
    write_result(
        out, "python -m benchmarks.peers", note=note, size=size, steps=STEPS, side=SIDE,
        goals=GOALS, summary=summary, mixed={
            "rate": round(rate, 3), "requests": len(asks), "work_over_plain": round(
                work(asks, STEPS, SIDE), 2),
        }, peers=results,
    )  # fmt: skip
    print(json.dumps(summary))


def measure(
    peers: Sequence[Peer], folder: Path, scratch: Path, images: int, requests: int
) -> tuple[dict[str, dict[str, Any]], float, list]:
    """Both rounds.

    Returns:
        The results by peer, the rate of the mixed requests, and these requests.
    """
    results: dict[str, dict[str, Any]] = {peer.name: {} for peer in peers}
    for peer in peers:
        found = results[peer.name]
        with running(peer, folder, scratch / f"{peer.name}.log") as live:
            closed_loop(live.send, 1, same(1, STEPS, SIDE))  # warm up
            for clients in CLIENTS:
                count = max(clients, images if clients > 1 else images // 2)
                answers, seconds = closed_loop(live.send, clients, same(count, STEPS, SIDE))
                found[f"c{clients}"] = describe(answers, seconds)
                console.print(peer.name, f"c{clients}", found[f"c{clients}"])
            found["start_s"] = [live.start_seconds]
        found["peak_gb"] = live.usage.peak_gb
    asks = mixed(requests, SIDE)
    others = [r for name, r in results.items() if name != OURS] or list(results.values())
    best = max(result["c1"]["images_per_second"] for result in others)
    rate = LOAD * best / work(asks, STEPS, SIDE)
    for peer in reversed(peers):
        found = results[peer.name]
        with running(peer, folder, scratch / f"{peer.name}.log") as live:
            closed_loop(live.send, 1, same(1, STEPS, SIDE))
            found["mixed"] = describe_mixed(*open_loop(live.send, rate, asks))
            console.print(peer.name, "mixed", found["mixed"])
            found["start_s"].append(live.start_seconds)
        found["peak_gb"] = max(found["peak_gb"], live.usage.peak_gb)
    return results, rate, asks


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Twinbrush over the best peer, by goal; empty where one side is missing."""
    others = {name: result for name, result in results.items() if name != OURS}
    if OURS not in results or not others:
        return {}
    ours, summary = results[OURS], {}
    for point in ("c1", "c8"):
        best = max(others, key=lambda name: others[name][point]["images_per_second"])
        ratio = ours[point]["images_per_second"] / others[best][point]["images_per_second"]
        summary[point] = {"ratio": round(ratio, 2), "best_peer": best}
    best = min(others, key=lambda name: others[name]["mixed"]["short"]["p99_s"])
    ratio = others[best]["mixed"]["short"]["p99_s"] / ours["mixed"]["short"]["p99_s"]
    summary["short_p99"] = {"ratio": round(ratio, 2), "best_peer": best}
    return summary


if __name__ == "__main__":
    typer.run(main)
