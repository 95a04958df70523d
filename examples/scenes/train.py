"""`python -m examples.scenes.train`: every stage in order, each going on from its last save.

How long each stage took, in seconds over all sessions, is in `RUNS/times.json`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.scenes import align, decoder, order, reward
from training import bert, clip, data, diffusion, distill, vqgan
from training.cli import stage_cli
from training.run import Run

STAGES = (clip, bert, vqgan, diffusion, distill, order, reward, align, decoder)
TOLD = (order, reward)  # need to know what is in the pictures
WRITE_EVERY = 5.0  # seconds of work whose time a kill may lose


def train(run: Run) -> None:
    """Runs every stage; `steps` and `batch` are each stage's own where they are 0."""
    run.runs.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bar:
        stages = [one for one in STAGES if one not in TOLD or data.knows_truth(run.source)]
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
    stage_cli(train)
