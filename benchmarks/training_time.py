"""`python -m benchmarks.training_time`: how long `python -m training.all` takes on this machine.

Every stage runs in its place twice, for few steps and for more. What the difference says of a
step, times the stage's own steps, and what every run needs beside its steps, is its time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import write_result
from training import data
from training.all import STAGES
from training.cli import pick_device
from training.run import Run

GOALS = {"cpu": 150.0, "cuda": 20.0}  # minutes
console = Console()


def main(
    few: Annotated[int, typer.Option(min=4, help="Steps of the shorter runs.")] = 8,
    more: Annotated[int, typer.Option(min=5, help="Steps of the longer runs.")] = 40,
    batch: Annotated[int, typer.Option(min=0, help="Of every stage; 0 is each stage's own.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option(help="bfloat16 products.")] = False,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "benchmarks/results/training_time.json"
    ),
) -> None:
    """Measures seconds a step of every stage, and tells the minutes of all."""
    if more <= few:
        sys.exit(f"error: --more: {more} is not more than --few, {few}")
    try:
        on = pick_device(device)
    except data.BadInput as error:
        sys.exit(f"error: {error}")
    stages = {}
    with tempfile.TemporaryDirectory() as scratch:
        for stage in STAGES:
            name = stage.__name__.rpartition(".")[-1]
            seconds = []
            for steps in (few, more):
                runs = Path(scratch, f"runs-{steps}")
                run = Run(Path(scratch, "made"), runs, steps, batch or stage.BATCH, on, bf16)
                began = time.perf_counter()
                stage.train(run)
                seconds.append(time.perf_counter() - began)
            step = (seconds[1] - seconds[0]) / (more - few)
            rest = max(0.0, seconds[0] - few * step)
            stages[name] = {
                "steps": stage.STEPS,
                "batch": run.batch,
                "seconds_a_step": round(step, 4),
                "seconds_beside": round(rest, 1),
                "minutes": round((rest + stage.STEPS * step) / 60, 1),
            }
            console.print(f"{name}: {json.dumps(stages[name])}")
    summary = {
        "minutes": round(sum(found["minutes"] for found in stages.values()), 1),
        "goal": GOALS[on.type],
    }
    write_result(
        out, "python -m benchmarks.training_time", device=on.type, bf16=bf16, summary=summary,
        stages=stages,
    )  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
