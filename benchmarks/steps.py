"""`python -m benchmarks.steps`: quality against denoising steps, distilled and not.

The same held-out prompts and seeds are painted by the distilled checkpoint and, with each
sampler that suits it, by its teacher. Both are exported beside each other and painted by the
serving engine in this process. Writes a plot beside the result file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from benchmarks.quality import NAMES, measure, tasks
from export.checkpoint import open_checkpoint
from export.repository import build
from twinbrush.onnx_runtime import LocalModels

STEPS = (1, 2, 4, 8, 25)
TEACHER_SAMPLERS = ("dpmpp_2m", "euler", "ddim")
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
    n: Annotated[int, typer.Option(min=3, help="Held-out prompts.")] = 600,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path(
        "benchmarks/results/steps.json"
    ),
) -> None:
    """Measures quality at 1 to 25 steps."""
    curves = _curves(student, ("lcm",), repository, n)
    curves |= _curves(teacher, TEACHER_SAMPLERS, repository, n)
    distilled = _percent(curves[f"{student.name} lcm"][4])
    taught = {s: _percent(curves[f"{teacher.name} {s}"][25]) for s in TEACHER_SAMPLERS}
    summary = {
        "distilled_4": distilled,
        "teacher_25": taught,
        "points_lost": round(max(taught.values()) - distilled, 1),
        "n": n,
    }
    write_result(
        out, "python -m benchmarks.steps", goal_points_lost=GOAL, summary=summary, curves=curves
    )
    plot(curves, out.with_suffix(".png"))
    print(json.dumps(summary))


def _curves(
    checkpoint: Path, samplers: tuple[str, ...], repository: Path, n: int
) -> dict[str, dict[int, dict[str, Any]]]:
    """All-correct by number of objects, of each sampler at each step count."""
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "repository"
        shutil.copytree(repository, served, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
        build(open_checkpoint(checkpoint), served)
        with local_engine(served, LocalModels(served)) as engine:
            for sampler in samplers:
                console.print(f"{checkpoint.name}, {sampler}")
                curve = curves[f"{checkpoint.name} {sampler}"] = {}
                for steps in STEPS:
                    table = measure(engine, tasks(n), steps=steps, sampler=sampler)
                    curve[steps] = {name: row["all_correct"] for name, row in table.items()}
    return curves


def _percent(row: dict[str, Any]) -> float:
    return row["all"]["percent"]


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
