"""`python -m benchmarks.pictures`: a sheet of pictures with their prompts, failures included.

Prompts and seeds are fixed, so nothing is picked by eye. Painted by the serving engine in this
process, with the checkpoint's defaults.
"""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from benchmarks.local_engine import local_engine
from twinbrush.generation import End, Event, Finished
from twinbrush.onnx_runtime import LocalModels
from twinbrush.request import GenerationRequest

PROMPTS = (
    "a large red circle on a white background",
    "a small green star on black",
    "a large yellow cross on a gray background",
    "there is a large blue ring on brown",
    "a large purple triangle against a white background",
    "a small orange square on a black background",
    "a large pink star on gray",
    "a large cyan circle on a brown background",
    "a large red circle left of a small blue square",
    "a small yellow star above a large purple ring on black",
    "a large green triangle to the right of a large orange cross on white",
    "on a gray background, a small pink circle below a small cyan square",
)
COLUMNS, TILE, CAPTION, MARGIN = 4, 192, 58, 12


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    out: Annotated[Path, typer.Option(help="Sheet to write.")] = Path(
        "checkpoints/scenes-64/pictures.png"
    ),
) -> None:
    """Paints the sheet."""
    with local_engine(repository, LocalModels(repository)) as engine:
        painted = [_paint(engine, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    rows = -(-len(PROMPTS) // COLUMNS)
    width, height = (n * size + MARGIN for n, size in ((COLUMNS, TILE + MARGIN),
                                                        (rows, TILE + CAPTION)))  # fmt: skip
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (prompt, picture) in enumerate(zip(PROMPTS, painted, strict=True)):
        x = MARGIN + i % COLUMNS * (TILE + MARGIN)
        y = MARGIN + i // COLUMNS * (TILE + CAPTION)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline="#bbbbbb")
        draw.text((x, y + TILE + 3), textwrap.fill(prompt, 30), "#222222", font)
    sheet.save(out)
    print(out)


def _paint(engine, prompt: str, seed: int) -> Image.Image:
    events: list[Event] = []
    ended = threading.Event()

    def reply(event: Event) -> None:
        events.append(event)
        if isinstance(event, End):
            ended.set()

    fields = {
        "prompt": np.array([prompt.encode()], object),
        "seed": np.array([seed]),
        "image_format": np.array([b"raw"], object),
    }
    request = GenerationRequest.parse(fields, engine.config)
    engine.submit(request, reply)
    ended.wait()
    data = next(event.image for event in events if isinstance(event, Finished))
    return Image.frombytes("RGB", (request.width, request.height), data)


if __name__ == "__main__":
    typer.run(main)
