"""`python -m examples.scenes.benchmarks.pictures`: a sheet of pictures, failures included.

The prompts are the first held-out ones of `examples.scenes.quality`, a row for each number of
objects, and seeds count from 0: nothing is picked by eye. Painted by the serving engine in this
process, with the checkpoint's defaults.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from benchmarks.local_engine import local_engine
from examples.scenes.quality import NAMES, paint, tasks
from twinbrush.runtimes.onnx_runtime import LocalModels

COLUMNS, TILE, CAPTION, MARGIN = 4, 192, 88, 12


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    out: Annotated[Path, typer.Option(help="Sheet to write.")] = Path(
        "checkpoints/scenes-64/pictures.png"
    ),
) -> None:
    """Paints the sheet."""
    rows = len(NAMES)
    first = tasks(rows * COLUMNS)
    prompts = [task.prompt for row in range(rows) for task in first[row::rows]]
    with local_engine(repository, LocalModels(repository)) as engine:
        painted = paint(engine, prompts)
    width, height = (n * size + MARGIN for n, size in ((COLUMNS, TILE + MARGIN),
                                                        (rows, TILE + CAPTION)))  # fmt: skip
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (prompt, pixels) in enumerate(zip(prompts, painted, strict=True)):
        x = MARGIN + i % COLUMNS * (TILE + MARGIN)
        y = MARGIN + i // COLUMNS * (TILE + CAPTION)
        picture = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(picture, (x, y))
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline="#bbbbbb")
        draw.text((x, y + TILE + 3), textwrap.fill(prompt, 30), "#222222", font)
    sheet.save(out)
    print(out)


if __name__ == "__main__":
    typer.run(main)
