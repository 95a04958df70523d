"""`python -m training.fusion CHECKPOINT --bert FOLDER --data …`: the fusion head alone.

CLIP, the text model, UNet and VAE stay as they are; only the head between them learns, by the
diffusion loss on captioned pictures. It starts as the identity, or as the checkpoint's own head.
Any checkpoint and text model that `python -m export` takes will do, and Stable Diffusion XL's
layout. The result is a checkpoint folder for `python -m export`. Several GPUs:
`accelerate launch -m training.fusion …`; several processes on CPUs:
`python -m torch.distributed.run --nproc-per-node N -m training.fusion … --device cpu`.
"""

from __future__ import annotations

import inspect
import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from export.checkpoint import Checkpoint, open_checkpoint
from export.pipeline import native_side
from export.sizes import scale_factor
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError
from training.captioned import Captioned
from training.cli import NO_DATA, SAVE_EVERY, parse_bounds, pick_bf16, pick_device
from training.compute import Compute
from training.data import BadInput, on_device
from training.frozen import SECOND, Frozen, has_two_clips
from training.fused_checkpoint import check_out, write_checkpoint
from training.latents import FIRST_DRAW, EncodedBatches, LatentBatch
from training.preparation import BOUNDS, Preparation
from training.run import Run

LEARNING_RATE, EMA_DECAY = 1e-4, 0.999
MEASURED, MEASURED_SEED = 32, 95_000_000  # pictures that the loss is measured on, and their draw


def train_fusion(
    run: Run,
    opened: Checkpoint,
    compute: Compute,
    checkpointing: bool = False,
    learning_rate: float = LEARNING_RATE,
) -> tuple[FusionHead, dict[str, float]]:
    """Trains the fusion head of a checkpoint on a run's source.

    Args:
        compute: precision, passes and processes; the run's batch is that of one pass.
        checkpointing: computes the UNet's activations again in the backward pass, which takes
            less memory and more time.

    Returns:
        The head, and in the main process the loss of the same pictures, timesteps and noise:
        with CLIP's tokens alone (`clip_alone`), with the head `before` and `after`.

    Raises:
        CheckpointError: a network cannot be loaded or used.
        BadInput: the data or a save cannot be used.
    """
    frozen = Frozen(opened, run.device)
    head = frozen.head()
    if checkpointing:
        frozen.unet.enable_gradient_checkpointing()
    parts = ("text_encoder", "bert", "unet", "vae", "fusion")
    reads = [opened.folders[part] for part in parts if part in opened.folders]
    if has_two_clips(opened):
        reads.append(opened.folders["unet"].parent / SECOND[0])
    trainer = run.trainer(head, "fusion", learning_rate, EMA_DECAY, reads, compute)
    first = run.first()
    losses = {}
    if compute.main:
        losses["clip_alone"] = measured(frozen, None, run)
        losses["before"] = measured(frozen, frozen.head(), run)  # `head` may be that of a save
    seed = FIRST_DRAW + first + compute.index * 2**31  # every process has an order of its own
    drawn = run.source.batches(seed, run.batch, run.device)
    batches = EncodedBatches(frozen.encode, drawn)

    def loss_at(draw: int) -> dict[str, torch.Tensor]:
        return {"loss": frozen.loss(head, batches.at(first + draw), first + draw)}

    with closing(batches):
        trained = trainer.run(loss_at, batches)
    if compute.main:
        losses["after"] = measured(frozen, trained, run)
    return trained, losses


@torch.no_grad()
def measured(frozen: Frozen, head: FusionHead | None, run: Run) -> float:
    """The loss of pictures of the run's source, always the same, at the same noise."""
    sample = run.source.sample(MEASURED_SEED, MEASURED)
    total = 0.0
    for start in range(0, len(sample.captions), run.batch):
        chosen = slice(start, start + run.batch)
        batch = replace(sample, pictures=sample.pictures[chosen], captions=sample.captions[chosen])
        x0 = frozen.encode(on_device(batch, run.device).pictures)
        rng = np.random.default_rng(MEASURED_SEED + start)
        latents = LatentBatch(x0, batch.captions, rng, [])
        total += len(x0) * frozen.loss(head, latents, MEASURED_SEED + start).item()
    return total / len(sample.captions)


def check_side(opened: Checkpoint, side: int) -> int:
    """The side of the pictures to train on; 0 is the UNet's own.

    Raises:
        BadInput: the UNet cannot take pictures of this side.
    """
    side = side or native_side(opened)
    levels = len(opened.config("unet")["block_out_channels"])
    multiple = scale_factor(opened) * 2 ** (levels - 1)
    if side % multiple:
        raise BadInput(f"--side: {side} is not a multiple of {multiple}, which the UNet needs")
    return side


def main(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint in diffusers layout.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    path: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A folder of pictures and captions, WebDataset tars, or parquet with"
            " COYO-700M's columns.",
        ),
    ] = None,
    bert: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the text model, if the checkpoint has none."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the frozen parts into --out, instead of links.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of saves and curves.")] = Path("runs"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a pass and process.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = LEARNING_RATE,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Less memory, more time: recompute the UNet."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 products: default on cuda.")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between saves: 100, and 500 on cuda.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of all draws.")] = 0,
    keep: Annotated[
        list[str],
        typer.Option(
            help="Rows to keep, COLUMN>=NUMBER or COLUMN<=NUMBER; repeatable; replaces"
            f" the default of its column: {', '.join(map(str, BOUNDS))}."
        ),
    ] = [],  # noqa: B006
    side: Annotated[int, typer.Option(help="Of the pictures; 0 is the UNet's own.")] = 0,
    crop: Annotated[str, typer.Option(help="center or random.")] = "center",
    max_aspect: Annotated[float, typer.Option(help="Longest long side over short.")] = 3.0,
    min_caption: Annotated[int, typer.Option(help="Characters; shorter is left out.")] = 3,
    max_caption: Annotated[int, typer.Option(help="Characters; longer is truncated.")] = 300,
    shuffle: Annotated[int, typer.Option(help="Rows of --data mixed at a time.")] = 2000,
    fetchers: Annotated[int, typer.Option(min=1, help="Pictures loaded at a time.")] = 16,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a web server may be silent.")
    ] = 10.0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")] = 0,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    try:
        if path is None:
            raise BadInput(NO_DATA)
        if not learning_rate > 0:
            raise BadInput(f"--learning-rate: {learning_rate} is not over 0")
        chosen = pick_device(device)
        check_out(out)
        opened = open_checkpoint(checkpoint, bert)
        if "bert" not in opened.folders:
            text = f"checkpoint {checkpoint} lacks its part bert/"
            raise CheckpointError(f"{text}; --bert names a text model to take")
        preparation = Preparation(
            check_side(opened, side), crop, parse_bounds(keep), max_aspect, min_caption,
            max_caption, timeout, fetchers=fetchers,
        )  # fmt: skip
        source = Captioned(path, preparation, shuffle)
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=chosen.type == "cpu")
        compute = Compute(pick_bf16(bf16, chosen), accumulate, accelerator)
        run = Run(
            out, runs, steps, batch, accelerator.device, compute.bf16,
            save_every or SAVE_EVERY[chosen.type], None, seed, source=source,
        )  # fmt: skip
        head, losses = train_fusion(run, opened, compute, checkpointing, learning_rate)
        if compute.main:
            write_checkpoint(opened, head, out, copy)
            print(json.dumps({name: round(loss, 6) for name, loss in losses.items()}))
        accelerator.end_training()
    except (BadInput, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main.__doc__ = inspect.getdoc(sys.modules[__name__])
    typer.run(main)
