"""Pictures of a run: loss curves, grids of samples, similarities of texts and pictures.

Knows nothing of models. Matplotlib is imported where it draws: training alone needs none.
"""

from __future__ import annotations

import csv
import io
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE, CAPTION, MARGIN = 128, 46, 8  # pixels
SMOOTHED = 0.05  # of a curve is averaged into its line


def replace_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    part = path.with_suffix(".part")
    picture.save(part, format="PNG")
    os.replace(part, path)


def draw_losses(curve: Path, path: Path) -> None:
    """Draws every column of `losses.csv` against its step; nothing where there are no rows."""
    if not curve.exists():
        return
    with curve.open(newline="") as file:
        heading, *rows = csv.reader(file)
    if not rows:
        return
    table = np.array(rows, float)  # (rows, 1 + curves)
    figure = _figure(8, 2.2 * (len(heading) - 1))
    window = max(1, int(SMOOTHED * len(table)))
    axes = figure.subplots(len(heading) - 1, sharex=True, squeeze=False)[:, 0]
    for i, (axis, name) in enumerate(zip(axes, heading[1:], strict=True), 1):
        mean = np.convolve(table[:, i], np.full(window, 1 / window), mode="valid")
        axis.plot(table[:, 0], table[:, i], color="#9ecae1", linewidth=0.8)
        axis.plot(
            table[window - 1 :, 0], mean, color="#08519c", marker="." if len(mean) == 1 else None
        )
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    replace_picture(_rendered(figure), path)


def grid(pictures: Tensor, columns: int, captions: list[str] | None = None) -> Image.Image:
    """A sheet of pictures (N, 3, S, S) in [-1, 1], row by row, with captions beneath."""
    pitch = TILE + MARGIN + (CAPTION if captions else 0)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * (TILE + MARGIN), MARGIN + rows * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, pixels in enumerate(pixels_of(pictures)):
        x, y = MARGIN + i % columns * (TILE + MARGIN), MARGIN + i // columns * pitch
        sheet.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        if captions:
            lines = textwrap.wrap(captions[i], TILE // 5, max_lines=3, placeholder=" …")
            draw.text((x, y + TILE + 3), "\n".join(lines), "#222222", font)
    return sheet


def similarities(matrix: Tensor, pictures: Tensor, captions: list[str]) -> Image.Image:
    """Captions (rows) against pictures (columns): `matrix` (N, N), `pictures` (N, 3, S, S)."""
    count = len(captions)
    figure = _figure(5 + 0.55 * count, 0.55 * (count + 1))
    axis = figure.subplots()
    shown = axis.imshow(matrix.float().cpu(), extent=(0, count, count, 0))
    strip = np.concatenate(list(pixels_of(pictures)), axis=1)
    axis.imshow(strip, extent=(0, count, 0, -1))  # a row of its own above the first
    axis.set(xlim=(0, count), ylim=(count, -1), xticks=[])
    axis.set_yticks(np.arange(count) + 0.5, [textwrap.shorten(text, 50) for text in captions])
    figure.colorbar(shown, label="similarity")
    return _rendered(figure)


def pixels_of(pictures: Tensor) -> np.ndarray:
    """(N, S, S, 3) uint8 of pictures (N, 3, S, S) in [-1, 1]."""
    scaled = (pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _rendered(figure) -> Image.Image:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=100)
    return Image.open(memory).convert("RGB")
