"""`python -m examples.scenes.benchmarks.losses`: perceptual and adversarial terms of the VQGAN.

Decoders of one encoder are trained from the same weights, on the same pictures, for the same
steps: with reconstruction alone, with each term, and with both. They start anew, or with
`--further` where the checkpoint's own decoder ended, which is then measured too. Held-out scenes
are decoded by all. Writes a plot and a sheet of pictures, side by side, beside the result file;
each training continues from its last save.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from diffusers import VQModel
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from skimage.metrics import structural_similarity
from torch import Tensor

from benchmarks.machine import write_result
from examples.scenes.quality import read, score, share, tasks
from examples.scenes.world import pictures, world_for
from export.checkpoint import open_checkpoint
from networks.loading import CheckpointError
from training import data
from training.cli import pick_device
from training.run import Run, check_trained
from training.sheets import pixels_of
from training.vqgan import Weights, sharpen

VARIANTS = {
    "reconstruction": Weights(0, 0),
    "perceptual": Weights(adversarial=0),
    "adversarial": Weights(perceptual=0),
    "both": Weights(),
}
EDGE = 0.25  # difference of neighbouring pixels, of 2, from which they are an edge
SHOWN, TILE, LABEL = 10, 96, 110
console = Console()


def main(
    checkpoint: Annotated[Path, typer.Option(help="Whose encoder and vision tower are used.")] = (
        Path("checkpoints/scenes-64")
    ),
    runs: Annotated[Path, typer.Option(help="Folder of saves.")] = Path("runs/losses"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each decoder.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Scenes a step.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option(help="bfloat16 products in training.")] = False,
    further: Annotated[
        bool, typer.Option(help="Decoders go on from the checkpoint's, and do not start anew.")
    ] = False,
    n: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 600,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file; pictures go beside it.")] = Path(
        "examples/scenes/results/losses.json"
    ),
) -> None:
    """Measures PSNR, SSIM, edge sharpness, and what the reader reads right."""
    if threads:
        torch.set_num_threads(threads)
    all_tasks = tasks(n)
    true = pictures([task.scene for task in all_tasks])
    painted: dict[str, Tensor] = {}
    try:
        check_trained(checkpoint, "image_encoder", "vae")
        start = _trained if further else _untrained
        folder = runs / f"{steps}x{batch}{'-further' if further else ''}"
        on = pick_device(device)
        run = Run(checkpoint, folder, steps, batch, on, bf16, source=world_for(on))
        if further:
            painted["before"] = _decoded(_trained(checkpoint), true)
        for name, weights in VARIANTS.items():
            console.print(f"training a decoder: {name}")
            alone = replace(run, runs=run.runs / name)
            trained = sharpen(start(checkpoint), weights, alone).cpu()
            painted[name] = _decoded(trained, true)
    except (CheckpointError, data.BadInput) as error:
        sys.exit(f"error: {error}")
    results = {name: _measures(y, true, all_tasks) for name, y in painted.items()}
    write_result(
        out, "python -m examples.scenes.benchmarks.losses", checkpoint=checkpoint.name,
        steps=steps, batch=batch, further=further, n=n,
        weights={name: asdict(weights) for name, weights in VARIANTS.items()}, results=results,
    )  # fmt: skip
    plot(results, out.with_suffix(".png"))
    sheet({"true": true, **painted}, out.with_name(f"{out.stem}_pictures.png"))
    print(json.dumps(results))


def _trained(checkpoint: Path) -> VQModel:
    return open_checkpoint(checkpoint).load("vae", VQModel)


def _untrained(checkpoint: Path) -> VQModel:
    """The checkpoint's encoder and codebook, and a fresh decoder, always the same."""
    trained = _trained(checkpoint)
    torch.manual_seed(0)
    vae = cast(VQModel, VQModel.from_config(trained.config))
    vae.encoder, vae.quant_conv = trained.encoder, trained.quant_conv
    vae.quantize = trained.quantize
    return vae


@torch.no_grad()
def _decoded(vae: VQModel, originals: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(x).latents, return_dict=False)[0] for x in originals.split(100)]
    return torch.cat(parts).clamp(-1, 1)


def _measures(y: Tensor, x: Tensor, all_tasks: list) -> dict[str, Any]:
    """Means over pictures (N, 3, H, W) in [-1, 1]."""
    psnr = 10 * torch.log10(4 / (y - x).square().mean((1, 2, 3)))
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=2.0)
        for a, b in zip(y.numpy(), x.numpy(), strict=True)
    ]
    right = [score(t, read(p)).all_correct for t, p in zip(all_tasks, pixels_of(y), strict=True)]
    return {
        "psnr": round(float(psnr.mean()), 2),
        "ssim": round(float(np.mean(ssim)), 4),
        "edge_sharpness": round(edge_sharpness(y, x), 4),
        "read_right": share(right),
    }


def edge_sharpness(y: Tensor, x: Tensor) -> float:
    """How steep `y` is where `x` has edges, over how steep `x` is: 1 is as sharp, 0 is flat."""
    steep = total = 0.0
    for dim in (2, 3):
        true, shown = x.diff(dim=dim), y.diff(dim=dim)
        edge = true.abs() > EDGE
        steep += float((shown * true.sign())[edge].sum())
        total += float(true.abs()[edge].sum())
    return steep / total


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel for each measure, a bar in it for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {"psnr": "PSNR, dB", "ssim": "SSIM", "edge_sharpness": "edge sharpness, 1 is true"}
    *axes, last = figure.subplots(1, 1 + len(panels))
    for panel, (measure, label) in zip(axes, panels.items(), strict=True):
        bars = panel.bar(list(results), [found[measure] for found in results.values()])
        panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        panel.set_ylabel(label)
    percent = np.array([found["read_right"]["percent"] for found in results.values()])
    low, high = np.array([found["read_right"]["interval"] for found in results.values()]).T
    last.bar(list(results), percent, yerr=(percent - low, high - percent), capsize=3)
    last.set_ylabel("read right, %")
    for panel in figure.axes:
        panel.tick_params("x", rotation=30)
        panel.margins(y=0.15)
    figure.savefig(file, dpi=120)


def sheet(rows: dict[str, Tensor], file: Path) -> None:
    """The first pictures of every variant, a row each."""
    picture = Image.new("RGB", (LABEL + SHOWN * TILE, len(rows) * TILE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, (name, shown) in enumerate(rows.items()):
        draw.text((6, i * TILE + TILE // 2 - 8), name, "#222222", font)
        for k, pixels in enumerate(pixels_of(shown[:SHOWN])):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            picture.paste(tile, (LABEL + k * TILE, i * TILE))
    picture.save(file)


if __name__ == "__main__":
    typer.run(main)
