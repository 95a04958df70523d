"""One run of a training stage: its folders, length, data and start. Knows no stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from diffusers.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from training import data
from training.compute import Compute
from training.loop import Trainer
from twinbrush.server.manifest import sha256_of


@dataclass(frozen=True)
class Run:
    """One run of a stage.

    Attributes:
        checkpoint: folder whose parts are read and written.
        runs: folder of saves, curves and samples, one folder in it for each `trainer`.
        steps, batch: optimiser steps, and pictures a step.
        source: the pictures and captions.
        bf16: bfloat16 products.
        save_every: steps between saves.
        init: checkpoint whose weights training starts from; random ones without it.
        seed: of the random weights and of every draw, under 2**31.
    """

    checkpoint: Path
    runs: Path
    steps: int
    batch: int
    device: torch.device = data.CPU
    bf16: bool = False
    source: data.Source = field(kw_only=True)
    save_every: int = 100
    init: Path | None = None
    seed: int = 0

    def first(self, started_from: Sequence[Path] = ()) -> int:
        """The number of the first draw; each step's is one more.

        Every seed has its own, and so has every start, so that training that continues from
        weights does not repeat the draws behind them. `started_from` are folders of such weights.
        """
        start = int(digest(started_from)[:8], 16) if started_from else 0
        return self.seed * 2**32 + start

    def trainer(
        self,
        module: nn.Module,
        name: str,
        learning_rate: float,
        ema_decay: float,
        reads: Sequence[Path] = (),
        compute: Compute | None = None,
    ) -> Trainer:
        """A trainer of `module`, which is on the run's device, into the folder `name`.

        `reads` are folders of weights that the training depends on: a save that was made with
        other weights or another seed is refused. `compute` is one pass in one process by default.
        """
        return Trainer(
            module, self.runs / name, self.steps, learning_rate, ema_decay, self.save_every,
            compute or Compute(self.bf16), f"{digest(reads)} {self.seed}",
        )  # fmt: skip


def check_trained(checkpoint: Path, *parts: str) -> None:
    """Raises BadInput where a checkpoint lacks parts that earlier stages make."""
    if missing := [part for part in parts if not (checkpoint / part).is_dir()]:
        raise data.BadInput(
            f"--checkpoint: {checkpoint} has no {', '.join(missing)}: train the stages before first"
        )


@contextmanager
def starting_from(path: Path, kind: str) -> Iterator[None]:
    """Raises BadInput that names `path` if reading a model of a kind fails inside."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        lines = str(error).splitlines()
        reason = lines[-1 if isinstance(error, RuntimeError) else 0].strip()  # torch's is its last
        raise data.BadInput(f"--init: {path} is no {kind} to start from: {reason}")


def save_part(model: nn.Module, folder: Path) -> None:
    """Writes a part of a checkpoint, without the path that its weights were read from."""
    transformers.utils.logging.disable_progress_bar()  # it would cut through the stage's own
    model.save_pretrained(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config.pop("_name_or_path", None)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def load_start(module: nn.Module, file: Path, kind: str) -> None:
    """Gives `module` the weights of a file in the checkpoint of `--init`.

    Raises:
        BadInput: there is no such file, it is broken, or has other tensors.
    """
    with starting_from(file, kind):
        module.load_state_dict(load_file(file))


def digest(folders: Sequence[Path]) -> str:
    """A hash of the weights in folders."""
    files = (file for folder in folders for file in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
