"""The command line that the training stages share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer


def stage_cli(train: Callable[[Path, Path, int, int, bool], None], steps: int, batch: int) -> None:
    """Runs `train(checkpoint, runs, steps, batch, bf16)` from the command line."""

    def main(
        checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path(
            "checkpoints/scenes-64"
        ),
        runs: Annotated[Path, typer.Option(help="Folder of saves and loss curves.")] = Path("runs"),
        steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = steps,
        batch: Annotated[int, typer.Option(help="Scenes a step.")] = batch,
        bf16: Annotated[
            bool, typer.Option(help="bfloat16 matrix products; pays on CPUs with AMX.")
        ] = False,
        threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all.")] = 0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        train(checkpoint, runs, steps, batch, bf16)

    main.__doc__ = inspect.getdoc(inspect.getmodule(train))
    typer.run(main)
