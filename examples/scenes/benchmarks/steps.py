"""`python -m examples.scenes.benchmarks.steps`: quality against denoising steps, distilled and not.

The same held-out prompts and seeds are painted by the distilled checkpoint with its own sampler
and, with two, by its teacher (a third, `euler`, takes `ddim`'s path on this noise schedule). Both
are exported beside each other and painted by the serving engine in this process. Writes a plot
beside the result file.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from examples.scenes.quality import NAMES, Score, Task, measure, table_of, tasks
from export.checkpoint import Checkpoint, open_checkpoint
from export.repository import build
from export.scheduler import SAMPLER_OF
from networks.loading import CheckpointError
from twinbrush.runtimes.onnx_runtime import LocalModels

STEPS = (1, 2, 4, 8, 25)
TEACHER_SAMPLERS = ("dpmpp_2m", "ddim")
GOAL = 2.0  # points that four distilled steps may lose against 25 of the teacher
console = Console()


def main(
    student: Annotated[Path, typer.Option(help="Distilled checkpoint.")] = Path(
        "checkpoints/scenes-64"
    ),
    teacher: Annotated[Path, typer.Option(help="What it was distilled from.")] = Path(
        "checkpoints/scenes-64-teacher"
    ),
    repository: Annotated[Path, typer.Option(help="Whose configurations are used.")] = Path(
        "model_repository"
    ),
    n: Annotated[int, typer.Option(min=3, help="Held-out prompts.")] = 1000,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path(
        "examples/scenes/results/steps.json"
    ),
) -> None:
    """Measures quality at 1 to 25 steps."""
    try:
        distilled, plain = _opened("student", student, True), _opened("teacher", teacher, False)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    all_tasks = tasks(n)
    own = SAMPLER_OF[distilled.classes["scheduler"]]
    learnt = _scores(distilled, (own,), repository, all_tasks)[own]
    by_sampler = _scores(plain, TEACHER_SAMPLERS, repository, all_tasks)
    labelled = {f"{distilled.name} {own}": learnt}
    labelled |= {f"{plain.name} {sampler}": scores for sampler, scores in by_sampler.items()}
    curves = {
        label: {steps: _right(all_tasks, scores) for steps, scores in by_steps.items()}
        for label, by_steps in labelled.items()
    }
    summary = {
        "all_correct_4": curves[f"{distilled.name} {own}"][4]["all"]["percent"],
        "points_lost": {
            sampler: points_lost(scores[25], learnt[4]) for sampler, scores in by_sampler.items()
        },
        "n": n,
    }
    write_result(
        out,
        "python -m examples.scenes.benchmarks.steps",
        goal_points_lost=GOAL,
        summary=summary,
        curves=curves,
    )
    plot(curves, out.with_suffix(".png"))
    print(json.dumps(summary))


def _opened(option: str, folder: Path, distilled: bool) -> Checkpoint:
    """The checkpoint of an option.

    Raises:
        CheckpointError: it cannot be exported, or is not of the kind that the option takes.
    """
    opened = open_checkpoint(folder)
    if (opened.config("unet").get("time_cond_proj_dim") is not None) != distilled:
        kind = "not distilled" if distilled else "distilled"
        raise CheckpointError(f"--{option}: the UNet of {folder} is {kind}")
    return opened


def _scores(
    checkpoint: Checkpoint, samplers: tuple[str, ...], repository: Path, all_tasks: list[Task]
) -> dict[str, dict[int, list[Score]]]:
    """Of every task, by sampler and step count."""
    found: dict[str, dict[int, list[Score]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "repository"
        shutil.copytree(repository, served, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
        build(checkpoint, served)
        with local_engine(served, LocalModels(served)) as engine:
            for sampler in samplers:
                console.print(f"{checkpoint.name}, {sampler}")
                found[sampler] = {
                    steps: measure(engine, all_tasks, steps=steps, sampler=sampler)
                    for steps in STEPS
                }
    return found


def _right(all_tasks: list[Task], scores: list[Score]) -> dict[str, Any]:
    """All-correct by number of objects."""
    return {name: row["all_correct"] for name, row in table_of(all_tasks, scores).items()}


def points_lost(before: list[Score], after: list[Score]) -> dict[str, Any]:
    """All-correct points lost on the same prompts and seeds, with a paired 95% interval.

    The interval is Agresti and Min's (doi:10.1002/sim.1781), which adds half a pair of each kind.
    """
    pairs = [(a.all_correct, b.all_correct) for a, b in zip(before, after, strict=True)]
    dropped, gained = pairs.count((True, False)), pairs.count((False, True))
    n = len(pairs) + 2
    middle = (dropped - gained) / n
    reach = 1.96 * math.sqrt(((dropped + gained + 1) / n - middle**2) / n)
    return {
        "points": round(100 * (dropped - gained) / len(pairs), 1),
        "interval": [round(100 * (middle - reach), 1), round(100 * (middle + reach), 1)],
    }


def plot(curves: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    """All-correct against steps, one panel for each number of objects and one for all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 4, sharey=True), (*NAMES.values(), "all"), strict=True
    ):
        for label, curve in curves.items():
            cells = [row[name] for row in curve.values()]
            percent = [cell["percent"] for cell in cells]
            low, high = zip(*(cell["interval"] for cell in cells), strict=True)
            axes.plot(list(curve), percent, marker="o", label=label)
            axes.fill_between(list(curve), low, high, alpha=0.15)
        axes.set(title=name.replace("_", " "), xlabel="steps", xscale="log", ylim=(0, 100))
        axes.set_xticks(STEPS, [str(step) for step in STEPS])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pictures all correct, %")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    typer.run(main)
