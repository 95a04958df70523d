"""`python -m examples.scenes.benchmarks.diversity`: how pictures of a prompt differ by seed.

A UNet that learns from a reward can come to paint always the same. Held-out prompts of one object
are painted from many seeds and read back: how far the object's places spread, and how often it is
large where the prompt leaves the size out, beside what true scenes of the training world do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import write_result
from examples.scenes.quality import Task, paint, scene_engine, tasks
from examples.scenes.reader import read
from examples.scenes.scenes import SIZES, Item, sample_scene

WORLD = 2000  # scenes that say how true places spread


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    n: Annotated[int, typer.Option(min=1, help="Prompts.")] = 60,
    seeds: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 16,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/diversity.json"
    ),
) -> None:
    """Measures how pictures of a prompt differ."""
    requests = [task for task in tasks(3 * n) if len(task.scene.items) == 1]
    with scene_engine(repository) as engine:
        painted = paint(engine, [task.prompt for task in requests for _ in range(seeds)])
        checkpoint = engine.config.checkpoint
    shown = [read(picture).items for picture in painted]
    found = [
        [items[0] for items in shown[k : k + seeds] if len(items) == 1]
        for k in range(0, len(shown), seeds)
    ]
    rng = np.random.default_rng(0)
    world = [sample_scene(rng, 1).items[0] for _ in range(WORLD)]
    summary = {
        "spread": spread(found),
        "spread_of_scenes": spread([[i for i in world if i.size == size] for size in SIZES]),
        "large_if_unnamed": large(requests, found),
        "large_of_scenes": round(100 * np.mean([item.size == "large" for item in world]), 1),
        "pictures_of_one_object": sum(map(len, found)),
        "pictures": len(painted),
    }
    write_result(
        out, "python -m examples.scenes.benchmarks.diversity", checkpoint=checkpoint,
        prompts=n, seeds=seeds,
        summary=summary,
    )  # fmt: skip
    print(json.dumps(summary))


def spread(places: list[list[Item]]) -> float | None:
    """Standard deviation in pixels, along either axis, of places within a group; mean of groups."""
    deviations = [
        np.std([[item.x, item.y] for item in group], axis=0, ddof=1).mean()
        for group in places
        if len(group) > 1
    ]
    return round(float(np.mean(deviations)), 2) if deviations else None


def large(requests: list[Task], found: list[list[Item]]) -> float | None:
    """Percent of large objects, where the prompt names no size."""
    free = [
        item.size == "large"
        for task, group in zip(requests, found, strict=True)
        if not any(size in task.prompt for size in SIZES)
        for item in group
    ]
    return round(100 * float(np.mean(free)), 1) if free else None


if __name__ == "__main__":
    typer.run(main)
