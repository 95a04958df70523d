"""`python -m examples.scenes.benchmarks.autoencoder`: what the VQGAN keeps of a picture.

Held-out scenes are encoded, quantised and decoded. What the reader still reads right is the most
that a UNet on these latents can reach.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import VQModel

from benchmarks.machine import write_result
from examples.scenes.quality import NAMES, read, score, share, tasks
from examples.scenes.world import pictures
from export.checkpoint import open_checkpoint
from networks.loading import CheckpointError
from training.sheets import pixels_of

GOALS = {"psnr": 28.0, "codes_used": 90.0}
BATCH = 100


@torch.no_grad()
def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = Path(
        "checkpoints/scenes-64"
    ),
    n: Annotated[int, typer.Option(min=3, help="Held-out scenes.")] = 1000,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path(
        "examples/scenes/results/autoencoder.json"
    ),
) -> None:
    """Measures reconstruction: PSNR in dB, codes used, and what the reader reads."""
    try:
        opened = open_checkpoint(checkpoint)
        vae = opened.load("vae", VQModel)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    all_tasks = tasks(n)
    psnr: list[float] = []
    right: dict[str, list[bool]] = {name: [] for name in NAMES.values()}
    used: set[int] = set()
    for start in range(0, n, BATCH):
        chunk = all_tasks[start : start + BATCH]
        true = pictures([task.scene for task in chunk])
        latents = vae.encode(true).latents
        used.update(vae.quantize(latents)[2][2].flatten().tolist())
        painted = vae.decode(latents).sample.clamp(-1, 1)
        psnr += (10 * torch.log10(4 / (painted - true).square().mean((1, 2, 3)))).tolist()
        for task, picture in zip(chunk, pixels_of(painted), strict=True):
            right[NAMES[len(task.scene.items)]].append(score(task, read(picture)).all_correct)
    summary = {
        "psnr": round(float(np.mean(psnr)), 2),
        "codes_used": round(100 * len(used) / vae.config["num_vq_embeddings"], 1),
        "n": n,
    }
    read_right = {name: share(values) for name, values in right.items()}
    write_result(
        out,
        "python -m examples.scenes.benchmarks.autoencoder",
        checkpoint=opened.name,
        goals=GOALS,
        summary=summary,
        read_right=read_right,
    )
    print(json.dumps(summary | {name: cell and cell["percent"] for name, cell in
                                read_right.items()}))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
