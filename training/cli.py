"""The command line that the training stages share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from networks.loading import CheckpointError
from training.captioned import Captioned
from training.data import BadInput, Source
from training.preparation import BOUNDS, Bound, Preparation
from training.run import Run

DEVICES = ("auto", "cpu", "cuda")
SAVE_EVERY = {"cpu": 100, "cuda": 500}  # steps
NO_DATA = (
    "--data is required: a folder of pictures and captions, WebDataset tars, or parquet with"
    " COYO-700M's columns"
)


def stage_cli(
    train: Callable[[Run], None], steps: int, batch: int, warm_start: bool = False
) -> None:
    """Runs a stage's `train` from the command line, with the stage's own steps and batch.

    With `warm_start` the stage can start from the weights of a checkpoint.
    """
    typer.run(stage_command(train, steps, batch, warm_start))


def stage_command(
    train: Callable[[Run], None],
    steps: int | None,
    batch: int | None,
    warm_start: bool = False,
    checkpoint: Path | None = None,
    world: Callable[[torch.device], Source] | None = None,
) -> Callable[..., None]:
    """The command of a stage; its options make the `Run` that `train` takes.

    Args:
        steps, batch: defaults; None leaves both to `train`, as 0.
        warm_start: the stage can start from the weights of a checkpoint.
        checkpoint: default of `--checkpoint`, which is required without.
        world: the source without `--data`, which is required without.
    """

    def main(
        checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = (
            checkpoint or ...
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
            typer.Option(help="Checkpoint whose weights the stage starts from, if it can."),
        ] = None,
        seed: Annotated[
            int, typer.Option(min=0, max=2**31 - 1, help="Of random weights and of all draws.")
        ] = 0,
        path: Annotated[
            Path | None,
            typer.Option(
                "--data",
                help="A folder of pictures and captions, WebDataset tars, or parquet with"
                " COYO-700M's columns.",
            ),
        ] = None,
        keep: Annotated[
            list[str],
            typer.Option(
                help="Rows to keep, COLUMN>=NUMBER or COLUMN<=NUMBER; repeatable; replaces"
                f" the default of its column: {', '.join(map(str, BOUNDS))}."
            ),
        ] = [],  # noqa: B006
        side: Annotated[int, typer.Option(help="Side of --data's pictures in pixels.")] = 64,
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
            chosen = pick_device(device)
            if path is not None:
                preparation = Preparation(
                    side, crop, parse_bounds(keep), max_aspect, min_caption, max_caption,
                    timeout, fetchers=fetchers,
                )  # fmt: skip
                source: Source = Captioned(path, preparation, shuffle)
            elif world is not None:
                source = world(chosen)
            else:
                raise BadInput(NO_DATA)
            if init is not None and not warm_start:
                raise BadInput("--init: this stage starts from random weights and takes none")
            if init is not None and init.resolve() == checkpoint.resolve():
                raise BadInput(f"--init: {init} is the --checkpoint to write; write another")
            train(
                Run(
                    checkpoint, runs, steps or 0, batch or 0, chosen, pick_bf16(bf16, chosen),
                    save_every or SAVE_EVERY[chosen.type], init, seed, source=source,
                )
            )  # fmt: skip
        except (BadInput, CheckpointError, OSError) as error:
            raise SystemExit(f"error: {error}")

    main.__doc__ = inspect.getdoc(inspect.getmodule(train))
    return main


def parse_bounds(keep: list[str]) -> tuple[Bound, ...]:
    """Bounds of `--keep`, and the defaults of the columns that it does not name.

    Raises:
        BadInput: a text is not COLUMN>=NUMBER or COLUMN<=NUMBER.
    """
    given = [Bound.parse(text) for text in keep]
    named = {bound.column for bound in given}
    return (*(bound for bound in BOUNDS if bound.column not in named), *given)


def pick_bf16(bf16: bool | None, device: torch.device) -> bool:
    """Whether products are bfloat16: `bf16`, or on cuda only if it is None."""
    return device.type == "cuda" if bf16 is None else bf16


def pick_device(name: str) -> torch.device:
    """The device that a name of `DEVICES` means here; `auto` is cuda if there is one.

    Raises:
        BadInput: for another name, and for cuda if there is none.
    """
    if name not in DEVICES:
        raise BadInput(f"--device: {name!r} is not one of {', '.join(DEVICES)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device: 'cuda' needs an NVIDIA GPU and a torch built for it; use cpu")
    return torch.device(name)
