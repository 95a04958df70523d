"""`python -m examples.scenes.average_weights`: replaces a part's weights by the mean of several.

A noisy gradient leaves noise in the weights, different in each round of training; the mean of
several rounds holds less of it (arXiv:1803.05407).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.data import BadInput


def main(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints to average; may be the one written too."),
    ],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path(
        "checkpoints/scenes-64"
    ),
    part: Annotated[str, typer.Option(help="Part of the checkpoints to average.")] = "unet",
) -> None:
    """Replaces a part's weights by the mean of those of several checkpoints."""
    try:
        file = weights_of(checkpoint, part)
        averaged = mean([weights_of(source, part) for source in sources], like=file)
        written = file.with_suffix(".part")
        save_file(averaged, written, {"format": "pt"})
        os.replace(written, file)
    except (BadInput, SafetensorError, OSError) as error:
        raise SystemExit(f"error: {error}")
    print(f"{file} is the mean of {len(sources)}")


def weights_of(checkpoint: Path, part: str) -> Path:
    """The file of a part's weights.

    Raises:
        BadInput: there is none, or several.
    """
    files = sorted((checkpoint / part).glob("*.safetensors"))
    if len(files) != 1:
        raise BadInput(f"--part: {checkpoint / part} has {len(files)} files of weights, not one")
    return files[0]


def mean(files: list[Path], like: Path) -> dict[str, Tensor]:
    """Of the weights in files, summed in FP32, in the types of those in `like`.

    Raises:
        BadInput: a file is of another model than `like`.
    """
    wanted = load_file(like)
    sums = {name: torch.zeros(tensor.shape) for name, tensor in wanted.items()}
    for file in files:
        tensors = load_file(file)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in wanted.items()}:
            raise BadInput(f"{file} has the weights of another model than {like}")
        for name, total in sums.items():
            total += tensors[name]
    return {name: (total / len(files)).to(wanted[name].dtype) for name, total in sums.items()}


if __name__ == "__main__":
    typer.run(main)
