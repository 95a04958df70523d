"""`python -m examples.scenes.train [STAGE]`: trains the demo checkpoint, all stages or one.

Stages: clip, bert, vqgan, diffusion, distill, spell_out_relations, reward, align, decoder; and
fit_fusion_head, which only runs when it is named. They train on scenes, or on captioned pictures
with --data. Each continues from its last save. `RUNS/times.json` holds the seconds of each stage
over all runs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.scenes import align, decoder, fit_fusion_head, reward, spell_out_relations
from examples.scenes.world import knows_truth, world_for
from training import bert, clip, diffusion, distill, vqgan
from training.cli import stage_command
from training.run import Run

CHECKPOINT = Path("checkpoints/scenes-64")
STAGES = (clip, bert, vqgan, diffusion, distill, spell_out_relations, reward, align, decoder)
ON_SCENES_ONLY = (spell_out_relations, reward)
WARM_START = (bert, vqgan, diffusion, distill, fit_fusion_head, align)  # take --init
WRITE_EVERY = 5.0  # seconds of work whose time a kill may lose


def train(run: Run) -> None:
    """Runs every stage; `steps` and `batch` are each stage's own if they are 0."""
    run.runs.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bar:
        stages = [
            stage for stage in STAGES if stage not in ON_SCENES_ONLY or knows_truth(run.source)
        ]
        task = bar.add_task("stages", total=len(stages))
        for stage in stages:
            name = stage_name(stage)
            bar.update(task, description=f"stages: {name}")
            steps, batch = run.steps or stage.STEPS, run.batch or stage.BATCH
            with timed(run.runs / "times.json", name):
                stage.train(replace(run, steps=steps, batch=batch))
            bar.advance(task)


def stage_name(stage: ModuleType) -> str:
    """As the command names it, and the folder of its saves."""
    return stage.__name__.rpartition(".")[-1]


def main() -> None:
    """Runs the stage that the first argument names, or all if it is an option or missing."""
    stages = {stage_name(stage): stage for stage in (*STAGES, fit_fusion_head)}
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        name = sys.argv.pop(1)
        if name not in stages:
            sys.exit(f"error: STAGE: {name!r} is not one of {', '.join(stages)}")
        stage = stages[name]
        steps, batch, warm_start = stage.STEPS, stage.BATCH, stage in WARM_START
        command = stage_command(stage.train, steps, batch, warm_start, CHECKPOINT, world_for)
    else:
        command = stage_command(train, None, None, False, CHECKPOINT, world_for)
    typer.run(command)


@contextmanager
def timed(path: Path, name: str) -> Iterator[None]:
    """Adds the time spent inside to `name` in a JSON file, also while it goes on."""
    times = json.loads(path.read_text()) if path.exists() else {}
    before, started, ended = times.get(name, 0.0), time.monotonic(), threading.Event()

    def write() -> None:
        times[name] = round(before + time.monotonic() - started, 1)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(times, indent=2) + "\n")
        os.replace(part, path)

    def keep_writing() -> None:
        while not ended.wait(WRITE_EVERY):
            write()

    writer = threading.Thread(target=keep_writing, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
        write()


if __name__ == "__main__":
    main()
