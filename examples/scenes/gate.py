"""`python -m examples.scenes.gate CHECKPOINT`: an export whose gate counts scenes.

It takes a checkpoint that paints the scenes' world. Its gate counts the pictures that show all
that their prompt says, before and after optimisation, instead of comparing pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from examples.scenes.quality import score, tasks
from examples.scenes.reader import read
from examples.scenes.scenes import SIDE
from export.command import (
    GateOptions,
    Options,
    export_checkpoint,
    parse_models,
    parse_precision,
    parse_prune,
    stop_on_error,
)
from export.gate import LEAST_PSNR, MakeMeasure, Measure, Paint, Psnr, Verdict
from export.source import Source
from twinbrush.engine.config import PipelineConfig

COUNT = 1000  # prompts
READABLE = 10  # percent of the unoptimised pictures; below, a count says nothing
PROBE = 50  # prompts that decide whether pictures can be read
LOSS = 1.0  # points


class AllCorrect:
    """Percent of pictures of scenes that show all that their prompt says."""

    name, side = "all correct", SIDE

    def __init__(self, loss: float = LOSS, prompts: int | None = None):
        self._loss, self._tasks = loss, tasks(prompts or COUNT)
        self.prompts = [task.prompt for task in self._tasks]
        self.before = 0.0

    @property
    def allowed(self) -> float:
        return self.before - self._loss

    def set_before(self, pictures: list[np.ndarray]) -> None:
        self.before = self.score(pictures)

    def score(self, pictures: list[np.ndarray]) -> float:
        """Of the pictures of the first prompts."""
        first = self._tasks[: len(pictures)]
        right = [score(t, read(p)).all_correct for t, p in zip(first, pictures, strict=True)]
        return 100 * sum(right) / len(right)

    def describe(self, verdict: Verdict) -> str:
        alone = [
            f"{name} {verdict.before - points:.1f} points" for name, points in verdict.alone.items()
        ]
        return (
            f"all-correct went from {verdict.before:.1f}% to {verdict.after:.1f}%"
            f" on {verdict.prompts} prompts, --gate-loss is {self._loss:g} points"
            + (f"; alone: {', '.join(alone)}" if alone else "")
        )


def all_correct(
    loss: float = LOSS, least_psnr: float = LEAST_PSNR, prompts: int | None = None
) -> MakeMeasure:
    """Counts all-correct pictures; compares pixels where the unoptimised ones cannot be read.

    Args:
        loss: points of all-correct pictures that may be lost.
        least_psnr: dB that the pictures must reach where they are compared.
        prompts: number of prompts; None is the measure's own.
    """

    def make(config: PipelineConfig, paint: Paint) -> Measure:
        measure = AllCorrect(loss, prompts)
        if config.native_side == measure.side:
            probe = paint(measure.prompts[:PROBE])
            if measure.score(probe) >= READABLE:
                measure.set_before(paint(measure.prompts))
                return measure
        other = Psnr(least_psnr, prompts)
        other.set_before(paint(other.prompts))
        return other

    return make


def main(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    repository: Annotated[Path, typer.Option(help="Model repository to build into.")] = Path(
        "model_repository"
    ),
    only: Annotated[str | None, typer.Option(help="Models to rebuild, with commas.")] = None,
    precision: Annotated[str, typer.Option(help="Precision of the models.")] = "fp32",
    prune: Annotated[
        str | None, typer.Option(help="Share of MACs to remove by model, as in unet=0.3.")
    ] = None,
    save_pruned: Annotated[
        Path | None, typer.Option(help="Keeps the pruned checkpoint in this new folder.")
    ] = None,
    gate_against: Annotated[
        str | None, typer.Option(help="Unoptimised checkpoint, where CHECKPOINT is a pruned one.")
    ] = None,
    gate_loss: Annotated[
        float, typer.Option(min=0, help="Points of all-correct scenes that may be lost.")
    ] = LOSS,
    gate_psnr: Annotated[
        float, typer.Option(min=0, help="dB that pictures must reach where they cannot be read.")
    ] = LEAST_PSNR,
    gate_prompts: Annotated[int | None, typer.Option(min=1, help=f"Default: {COUNT}.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Writes the table into this file, as JSON.")
    ] = None,
) -> None:
    """Exports a checkpoint of scenes, and refuses when optimised models paint fewer right."""
    with stop_on_error(repository):
        models = parse_models(only)
        options = Options(
            Source(checkpoint),
            repository,
            models,
            parse_precision(precision),
            prune=parse_prune(prune, models, save_pruned),
            gate=GateOptions(all_correct(gate_loss, gate_psnr, gate_prompts), gate_against),
        )
        export_checkpoint(options, report)


if __name__ == "__main__":
    typer.run(main)
