"""The command line that the training stages share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from networks.loading import CheckpointError
from training.captioned import Captioned
from training.data import BadInput, SceneWorld, Source
from training.preparation import BOUNDS, Bound, Preparation
from training.run import Run

DEVICES = ("auto", "cpu", "cuda")
WORKERS = 8  # processes at most that draw scenes for a GPU
SAVE_EVERY = {"cpu": 100, "cuda": 500}  # steps


def stage_cli(
    train: Callable[[Run], None],
    steps: int | None = None,
    batch: int | None = None,
    warm_start: bool = False,
) -> None:
    """Runs a stage's `train` from the command line, with the stage's own steps and batch.

    With `warm_start` the stage can start from the weights of a checkpoint.
    """

    def main(
        checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path(
            "checkpoints/scenes-64"
        ),
        runs: Annotated[Path, typer.Option(help="Folder of saves and curves.")] = Path("runs"),
        steps: Annotated[
            int | None, typer.Option(min=1, help="Optimiser steps of a stage.")
        ] = steps,
        batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step.")] = batch,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        bf16: Annotated[
            bool | None,
            typer.Option(
                help="bfloat16 products: default on cuda; pays on CPUs with AMX or AVX512-BF16."
            ),
        ] = None,
        save_every: Annotated[
            int | None, typer.Option(min=1, help="Steps between saves: 100, and 500 on cuda.")
        ] = None,
        init: Annotated[
            Path | None,
            typer.Option(
                help="Checkpoint to start from: its BERT in training.bert, its fusion head and UNet"
                " in training.diffusion, its VQGAN, whose decoder learns further, in"
                " training.vqgan, its fusion head in examples.scenes.refit, its distilled UNet in"
                " training.distill and examples.scenes.align."
            ),
        ] = None,
        seed: Annotated[
            int, typer.Option(min=0, max=2**31 - 1, help="Of random weights and of all draws.")
        ] = 0,
        path: Annotated[
            Path | None,
            typer.Option(
                "--data",
                help="Train on this: a folder of pictures and captions, WebDataset tars, or"
                " parquet with COYO-700M's columns; without it on scenes.",
            ),
        ] = None,
        keep: Annotated[
            list[str],
            typer.Option(
                help="Rows to keep, COLUMN>=NUMBER or COLUMN<=NUMBER; repeatable; takes the place"
                f" of the default of its column: {', '.join(map(str, BOUNDS))}."
            ),
        ] = [],  # noqa: B006
        side: Annotated[int, typer.Option(help="Side of --data's pictures in pixels.")] = 64,
        crop: Annotated[str, typer.Option(help="center or random.")] = "center",
        max_aspect: Annotated[float, typer.Option(help="Longest long side over short.")] = 3.0,
        min_caption: Annotated[int, typer.Option(help="Characters; shorter is left out.")] = 3,
        max_caption: Annotated[int, typer.Option(help="Characters; longer is cut.")] = 300,
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
            chosen = pick_device(device)
            source: Source = scenes_for(chosen)
            if path is not None:
                asked = [Bound.parse(text) for text in keep]
                named = {bound.column for bound in asked}
                bounds = (*(bound for bound in BOUNDS if bound.column not in named), *asked)
                preparation = Preparation(
                    side, crop, bounds, max_aspect, min_caption, max_caption,
                    timeout, fetchers=fetchers,
                )  # fmt: skip
                source = Captioned(path, preparation, shuffle)
            if init is not None and not warm_start:
                raise BadInput("--init: training.clip, .order, .reward, .decoder, .all take none")
            if init is not None and init.resolve() == checkpoint.resolve():
                raise BadInput(f"--init: {init} is what --checkpoint writes; write another")
            train(
                Run(
                    checkpoint, runs, steps or 0, batch or 0, chosen,
                    pick_bf16(bf16, chosen), source,
                    save_every or SAVE_EVERY[chosen.type], init, seed,
                )
            )  # fmt: skip
        except (BadInput, CheckpointError, OSError) as error:
            raise SystemExit(f"error: {error}")

    main.__doc__ = inspect.getdoc(inspect.getmodule(train))
    typer.run(main)


def scenes_for(device: torch.device) -> SceneWorld:
    """Scenes that are drawn fast enough for a device."""
    return SceneWorld(min(WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0)


def pick_bf16(asked: bool | None, device: torch.device) -> bool:
    """Whether products are bfloat16: what was asked, else on cuda only."""
    return device.type == "cuda" if asked is None else asked


def pick_device(name: str) -> torch.device:
    """The device that a name of `DEVICES` means here; `auto` is cuda where there is one.

    Raises:
        BadInput: for another name, and for cuda where there is none.
    """
    if name not in DEVICES:
        raise BadInput(f"--device: {name!r} is not one of {', '.join(DEVICES)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device: 'cuda' needs an NVIDIA GPU and a torch built for it; use cpu")
    return torch.device(name)
