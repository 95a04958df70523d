"""`python -m benchmarks.lora`: what LoRAs that requests switch on cost a UNet call.

A UNet of Stable Diffusion 1.5's form and half its widths, with random weights, is exported without
LoRAs and with sets of one and four; each LoRA has factors on every linear layer of the
attention blocks. The sets take turns in one run, with all scales on. The other way to serve a
LoRA is a second UNet with it fused: its calls cost what those without LoRAs do, and it takes the
weights once more.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.machine import write_result
from export.convert import to_onnx
from export.lora_set import Factors, LoraScales, attach_factors, with_scales
from export.part import Part, TensorSpec, integers, normal
from export.unet import UNet
from twinbrush.engine.config import TOKENS
from twinbrush.runtimes.onnx_runtime import open_session

SETS = (0, 1, 4)
BATCHES = (1, 4)
CELLS = 32  # of a latent's side: pictures of 256 pixels
WIDTH, LENGTH = 768, 77  # of the text tokens


def main(
    rank: Annotated[int, typer.Option(min=1, help="Of each LoRA.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Calls of each set and batch.")] = 10,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/results/lora.json"),
) -> None:
    """Times calls of a UNet with sets of no, one and four LoRAs, and sizes their files."""
    sessions, sets = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for count in SETS:
            part = painter(count, rank)
            file = Path(scratch, str(count), "model.onnx")
            file.parent.mkdir()
            to_onnx(part, file)
            sessions[count] = open_session(file, {})
            sets[count] = {
                "parameters": sum(p.numel() for p in part.module.parameters()),
                "mb": round(sum(f.stat().st_size for f in file.parent.iterdir()) / 1e6, 1),
                "ms": {},
            }
    for rows in BATCHES:
        taken = timed(sessions, rows, turns)
        for count in SETS:
            milliseconds = 1000 * statistics.median(taken[count])
            ratios = [a / b for a, b in zip(taken[count], taken[0], strict=True)]
            sets[count]["ms"][rows] = round(milliseconds, 1)
            sets[count].setdefault("times_plain", {})[rows] = round(statistics.median(ratios), 3)
    write_result(out, "python -m benchmarks.lora", rank=rank, turns=turns, cells=CELLS, sets=sets)
    sys.stdout.write(json.dumps(sets) + "\n")


def painter(count: int, rank: int) -> Part:
    """The UNet with the factors of `count` LoRAs."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=CELLS, block_out_channels=(160, 320, 640, 640), cross_attention_dim=WIDTH,
        attention_head_dim=8, down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    )  # fmt: skip
    scales = attach_factors(unet, random_factors(unet, count, rank), count) if count else None
    latent = TensorSpec(torch.float32, (4, "height", "width"))
    inputs = {
        "sample": latent,
        "timestep": TensorSpec(torch.float32, ()),
        TOKENS: TensorSpec(torch.float32, ("tokens", WIDTH)),
    }

    def example(batch: int, size: int) -> dict[str, torch.Tensor]:
        return {
            "sample": normal((batch, 4, 8 * size, 8 * size + 8)),
            "timestep": integers((batch,), 1000).float(),
            TOKENS: normal((batch, LENGTH, WIDTH)),
        }

    module = UNet(unet, scales or LoraScales(0))
    return with_scales(Part("unet", module, inputs, {"model_output": latent}, example), scales)


def random_factors(unet: nn.Module, count: int, rank: int) -> dict[nn.Module, list[Factors]]:
    """Factors for every linear layer of the attention blocks."""
    layers = [
        layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and ".attentions." in name
    ]
    return {
        layer: [
            Factors(
                index,
                torch.randn(rank, layer.in_features) / layer.in_features**0.5,
                torch.randn(layer.out_features, rank) / rank,
            )
            for index in range(count)
        ]
        for layer in layers
    }


def timed(sessions: dict[int, Any], rows: int, turns: int) -> dict[int, list[float]]:
    """Seconds of each call; the sets take turns, and the first turn is warm-up."""
    rng = np.random.default_rng(0)
    feed = {
        "sample": rng.standard_normal((rows, 4, CELLS, CELLS), np.float32),
        "timestep": np.full(rows, 500, np.float32),
        TOKENS: rng.standard_normal((rows, LENGTH, WIDTH), np.float32),
    }
    taken: dict[int, list[float]] = {count: [] for count in sessions}
    for turn in range(turns + 1):
        for count, session in sessions.items():
            scales = {"lora_scale": np.ones((rows, count), np.float32)} if count else {}
            started = time.perf_counter()
            session.run(None, feed | scales)
            if turn:
                taken[count].append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    typer.run(main)
