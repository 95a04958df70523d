"""`python -m benchmarks.faults`: faults, overload and bad clients against the real server.

Each part starts a server of its own on free ports. A run of some parts keeps the results of the
others that the file holds.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.faults import fuzz, killed, parsers, pressure, soak, upstream
from benchmarks.machine import write_result

PARTS: dict[str, Callable[[Path], dict]] = {
    "stub_killed": killed.stub_killed,
    "server_killed": killed.server_killed,
    "hung_network": killed.hung_network,
    "cancel": pressure.cancel,
    "overload": pressure.overload,
    "drain": pressure.drain,
    "slow_reader": pressure.slow_reader,
    "starvation": pressure.starvation,
    "soak": soak.soak,
    "fuzz": fuzz.fuzz,
    "parsers": parsers.parsers,
    "upstream": upstream.upstream,
}
GOALS = {
    "stub_killed": {"requests_without_an_answer": 0},
    "server_killed": {"requests_without_an_answer": 0},
    "hung_network": {"requests_without_an_answer": 0},
    "cancel": {"steps_wasted_p50": 1},
    "overload": {"goodput_share": 0.95},
    "drain": {"lost": 0},
    "slow_reader": {"ratio": 1.2},
    "starvation": {"work_share_over_fair": 0.5},
    "soak": {"threads_gained": 0, "descriptors_gained": 0},
    "fuzz": {"crashes": 0, "without_an_answer": 0, "unforeseen": 0},
    "parsers": {"failures": 0},
}


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    only: Annotated[str, typer.Option(help=f"Parts, with commas: {', '.join(PARTS)}.")] = "",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/faults.json"
    ),
) -> None:
    """Runs the parts and writes what clients and operators would have seen."""
    chosen = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]}: the parts are {', '.join(PARTS)}")
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in chosen:
        typer.echo(f"{name} ...")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        results[name] = {"measured": today, **PARTS[name](repository)}
        typer.echo(json.dumps(results[name]))
        ordered = {part: results[part] for part in PARTS if part in results}
        write_result(out, "python -m benchmarks.faults", goals=GOALS, results=ordered)
    print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
