"""`python -m examples.scenes.benchmarks.training_time`: minutes of `examples.scenes.train` here.

Every stage runs in its place twice: for few steps, and for as many more as lie between two saves.
The difference is the time of so many steps and a save; with it, the stage's own steps and the time
that every run needs beside them, the stage's minutes follow. With `--runs` nothing runs: the
minutes are those of a run of `examples.scenes.train` that has ended.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors import safe_open

from benchmarks.machine import write_result
from examples.scenes.train import STAGES, stage_name
from examples.scenes.world import world_for
from training import data
from training.cli import SAVE_EVERY, pick_bf16, pick_device
from training.run import Run

GOALS = {"cpu": 150.0, "cuda": 20.0}  # minutes
console = Console()


def main(
    few: Annotated[int, typer.Option(min=4, help="Steps of the shorter runs.")] = 8,
    save_every: Annotated[
        int | None, typer.Option(min=4, help="Steps between saves, as in examples.scenes.train.")
    ] = None,
    batch: Annotated[int, typer.Option(min=0, help="Of every stage; 0 is each stage's own.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[
        bool | None, typer.Option(help="bfloat16 products, as in examples.scenes.train.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="--runs of an examples.scenes.train here that has ended; --bf16 if it had that."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/training_time.json"
    ),
) -> None:
    """Measures seconds a step of every stage, and adds up the minutes of all."""
    try:
        on = pick_device(device)
    except data.BadInput as error:
        sys.exit(f"error: {error}")
    saving = save_every or SAVE_EVERY[on.type]
    products = pick_bf16(bf16, on)
    stages = taken(runs) if runs else measured(few, saving, batch, on, products)
    summary = {
        "minutes": round(sum(found["minutes"] for found in stages.values()), 1),
        "goal": GOALS[on.type],
    }
    write_result(
        out, "python -m examples.scenes.benchmarks.training_time", device=on.type, bf16=products,
        save_every=saving, summary=summary, stages=stages,
    )  # fmt: skip
    print(json.dumps(summary))


def taken(runs: Path) -> dict[str, dict[str, float]]:
    """Minutes of every stage of a run that has ended, with the stages' own steps."""
    last = runs / stage_name(STAGES[-1]) / "state.safetensors"
    done = 0
    if last.exists():
        with safe_open(last, "pt") as file:
            done = int(file.metadata()["step"])
    if done < STAGES[-1].STEPS:
        sys.exit(f"error: --runs: {last} has {done} steps of {STAGES[-1].STEPS}: it has not ended")
    times = json.loads((runs / "times.json").read_text())
    return {
        name: {"steps": stage.STEPS, "batch": stage.BATCH, "minutes": round(times[name] / 60, 1)}
        for name, stage in zip(map(stage_name, STAGES), STAGES, strict=True)
    }


def measured(
    few: int, saving: int, batch: int, device: torch.device, bf16: bool
) -> dict[str, dict[str, float]]:
    """Seconds a step of every stage and beside them, and the minutes of its own steps."""
    source, stages = world_for(device), {}
    with tempfile.TemporaryDirectory() as scratch:
        for stage in STAGES:
            seconds = []
            for steps in (few, few + saving):
                run = Run(
                    Path(scratch, "made"), Path(scratch, f"runs-{steps}"), steps,
                    batch or stage.BATCH, device, bf16, saving, source=source,
                )  # fmt: skip
                began = time.perf_counter()
                stage.train(run)
                seconds.append(time.perf_counter() - began)
            step = (seconds[1] - seconds[0]) / saving
            rest = max(0.0, seconds[0] - few * step)
            name = stage_name(stage)
            stages[name] = {
                "steps": stage.STEPS,
                "batch": run.batch,
                "seconds_a_step": round(step, 4),
                "seconds_beside": round(rest, 1),
                "minutes": round((rest + stage.STEPS * step) / 60, 1),
            }
            console.print(f"{name}: {json.dumps(stages[name])}")
    return stages


if __name__ == "__main__":
    typer.run(main)
