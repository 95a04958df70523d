"""`python -m examples.scenes.benchmarks.outlines`: how true to form painted objects are.

`examples.scenes.quality` takes a circle with corners for a circle. Here held-out prompts are
painted, and every right picture is compared with a drawing of what is read from it: shapes,
colours, sizes and places as they are read, with the outlines that they should have. True pictures,
compared in the same way, give the best that can be reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import write_result
from examples.scenes.quality import paint, scene_engine, score, tasks
from examples.scenes.reader import Reading, read
from examples.scenes.scenes import Scene, render

BEST = 60.0  # dB, of pictures that are alike but for rounding


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    n: Annotated[int, typer.Option(min=1, help="Prompts.")] = 1000,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/outlines.json"
    ),
) -> None:
    """Measures PSNR in dB of right pictures against drawings of what is read from them."""
    requests = tasks(n)
    with scene_engine(repository) as engine:
        pictures = paint(engine, [task.prompt for task in requests])
        checkpoint = engine.config.checkpoint
    found = [
        likeness(picture, reading)
        for task, picture in zip(requests, pictures, strict=True)
        if score(task, reading := read(picture)).all_correct
    ]
    true = [render(task.scene) for task in requests]
    summary = {
        "psnr": _mean(found),
        "psnr_of_true": _mean([likeness(picture, read(picture)) for picture in true]),
        "right": len(found),
        "n": n,
    }
    write_result(
        out, "python -m examples.scenes.benchmarks.outlines", checkpoint=checkpoint,
        summary=summary, tenth=_tenth(found),
    )  # fmt: skip
    print(json.dumps(summary))


def likeness(picture: np.ndarray, reading: Reading) -> float:
    """PSNR in dB, `BEST` at most, of a picture (64, 64, 3) uint8 against what is read from it."""
    drawn = render(Scene(reading.items, reading.background)).astype(np.float64)
    error = np.square(picture - drawn).mean()
    return float(min(BEST, 10 * np.log10(255**2 / max(error, 1e-9))))


def _mean(found: list[float]) -> float | None:
    return round(float(np.mean(found)), 2) if found else None


def _tenth(found: list[float]) -> float | None:
    """What a tenth of the pictures is below."""
    return round(float(np.percentile(found, 10)), 2) if found else None


if __name__ == "__main__":
    typer.run(main)
