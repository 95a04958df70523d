"""`python -m benchmarks.peers`: Twinbrush beside other ways to serve the same checkpoint.

Random weights of Stable Diffusion 1.5's size (LCM, 4 steps, 256x256), or of a fraction of it. All
servers live at once and have all cores; one of them is under load at a time, and they take turns,
since the pace of a shared machine changes by the minute: closed loops of 1, 4 and 8 clients, then
Poisson arrivals of mixed requests. Pictures are not compared here: `benchmarks.fullsize` does that.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.machine import write_result
from benchmarks.peers.load import (
    Answered,
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
    turns: Annotated[int, typer.Option(min=1, help="How often every load runs.")] = 3,
    requests: Annotated[int, typer.Option(min=4, help="Mixed requests of a turn.")] = 8,
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
        results, rate = measure(peers, made, Path(scratch), turns, requests)
    summary = summarise(results)
    write_result(
        out, "python -m benchmarks.peers", note=note, size=size, steps=STEPS, side=SIDE,
        turns=turns, goals=GOALS, summary=summary, mixed_requests_per_second=round(rate, 3),
        peers=results,
    )  # fmt: skip
    print(json.dumps(summary))


def measure(
    peers: Sequence[Peer], folder: Path, scratch: Path, turns: int, requests: int
) -> tuple[dict[str, dict[str, Any]], float]:
    """All loads.

    Returns:
        The results by peer, and the rate of the mixed requests.
    """
    with ExitStack() as stack:
        live = {}
        for peer in peers:
            log = scratch / f"{peer.name}.log"
            live[peer.name] = stack.enter_context(running(peer, folder, log))
            console.print(peer.name, "started in", live[peer.name].start_seconds, "s")
        results: dict[str, dict[str, Any]] = {name: {} for name in live}
        for one in live.values():  # warm up, with every number of rows
            closed_loop(one.send, max(CLIENTS), same(max(CLIENTS), 1, SIDE))
        for turn, clients in product(range(turns), CLIENTS):
            asks = same(2 * clients, STEPS, SIDE)
            for name in _order(live, turn):
                point = describe(*closed_loop(live[name].send, clients, asks))
                results[name].setdefault(f"c{clients}", []).append(point)
                console.print(turn, name, f"c{clients}", point)
        others = [r for name, r in results.items() if name != OURS] or list(results.values())
        best = max(_middle(result["c1"], "images_per_second") for result in others)
        loads = [mixed(requests, SIDE, turn) for turn in range(turns)]
        rate = LOAD * best / work([ask for asks in loads for ask in asks], STEPS, SIDE)
        answers: dict[str, list[Answered]] = {name: [] for name in live}
        seconds = dict.fromkeys(live, 0.0)
        for turn, asks in enumerate(loads):
            for name in _order(live, turn):
                answered, taken = open_loop(live[name].send, rate, asks, turn)
                answers[name] += answered
                seconds[name] += taken
        for name, one in live.items():
            results[name] |= {
                "mixed": describe_mixed(answers[name], seconds[name]),
                "start_s": one.start_seconds, "peak_gb": one.usage.peak_gb,
            }  # fmt: skip
            console.print(name, "mixed", results[name]["mixed"])
    return results, rate


def _order(names: Iterable[str], turn: int) -> list[str]:
    return list(names)[:: 1 if turn % 2 == 0 else -1]


def _middle(points: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(point[key] for point in points)


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Twinbrush over the best peer, by goal; empty where one side is missing.

    Throughputs are compared turn by turn, each with the best peer over all turns.
    """
    others = {name: result for name, result in results.items() if name != OURS}
    if OURS not in results or not others:
        return {}
    ours, summary = results[OURS], {}
    for point in ("c1", "c8"):
        best = max(others, key=lambda name: _middle(others[name][point], "images_per_second"))
        ratios = [
            a["images_per_second"] / b["images_per_second"]
            for a, b in zip(ours[point], others[best][point], strict=True)
        ]
        summary[point] = {"ratio": round(statistics.median(ratios), 2), "best_peer": best}
    best = min(others, key=lambda name: others[name]["mixed"]["short"]["p99_s"])
    ratio = others[best]["mixed"]["short"]["p99_s"] / ours["mixed"]["short"]["p99_s"]
    summary["short_p99"] = {"ratio": round(ratio, 2), "best_peer": best}
    return summary


if __name__ == "__main__":
    typer.run(main)
