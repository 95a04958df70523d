"""`python -m benchmarks.pruning`: what a model loses and gains, from pruning ratio to ratio.

Each ratio prunes the checkpoint anew; quality is counted on held-out prompts before and after
recovery by distillation, the other models being those of the repository. Step times are
medians of calls that take turns with the unpruned model in one run. The result file is written
after every ratio, and with the step times at the end, when a plot goes beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from examples.scenes.quality import paint, score, share, tasks
from examples.scenes.reader import read
from export.checkpoint import open_checkpoint
from export.convert import to_onnx
from export.macs import native_rows
from export.part import Part
from export.prune import RatioError, prune_checkpoint
from export.repository import SOURCE, load_parts
from networks.loading import CheckpointError
from networks.pruned import pruning_of
from training.recover import recover
from training.run import Run
from twinbrush.runtimes.onnx_runtime import LocalModels, open_session, read_config

BATCHES = (1, 16)
GOALS = {"macs_removed": 30.0, "speedup_b1": 1.25, "speedup_b16": 1.25, "points_lost": 1.0}
console = Console()


def main(
    checkpoint: Annotated[Path, typer.Option(help="Unpruned checkpoint.")] = Path(
        "checkpoints/scenes-64"
    ),
    repository: Annotated[Path, typer.Option(help="Its export.")] = Path("model_repository"),
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SOURCE)}.")] = "unet",
    ratios: Annotated[str, typer.Option(help="Shares of MACs, with commas.")] = "0.15,0.3,0.45,0.6",
    recovery: Annotated[int, typer.Option(min=0, help="Distillation steps; 0 is none.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Scenes a distillation step.")] = 64,
    bf16: Annotated[bool, typer.Option(help="bfloat16 products in distillation.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of recovery's saves.")] = Path("runs/pruning"),
    n: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 1000,
    turns: Annotated[int, typer.Option(min=1, help="Calls of each model and batch.")] = 100,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path(
        "benchmarks/results/pruning.json"
    ),
) -> None:
    """Curves of quality and speed against pruning ratio."""
    points: list[dict[str, Any]] = []
    unreachable: list[dict[str, Any]] = []

    def save() -> None:
        write_result(
            out, "python -m benchmarks.pruning", checkpoint=checkpoint.name, model=model,
            goals=GOALS if model == "unet" else None, n=n,
            recovery={"steps": recovery, "batch": batch}, points=points,
            unreachable=unreachable,
        )  # fmt: skip

    try:
        shares = _check(checkpoint, repository, model, ratios)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(checkpoint, repository, model, Path(scratch), n)
            points.append(bench.unpruned())
            save()
            for ratio in shares:
                try:
                    points.append(bench.pruned(ratio, runs, recovery, batch, bf16))
                except RatioError as error:
                    unreachable.append({"ratio": ratio, "reason": str(error)})
                save()
            times = bench.step_times(turns)
    except (CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
    for point, medians in zip(points, times, strict=True):
        point["step_ms"] = medians
        point["speedup"] = {b: round(times[0][b] / ms, 3) for b, ms in medians.items()}
    summary = {
        str(p["ratio"]): {"macs_removed": p["macs_removed"], "speedup": p["speedup"],
                          "all_correct": [_percent(p["pruned"]), _percent(p["recovered"])]}
        for p in points
    }  # fmt: skip
    save()
    plot(points, model, out.with_suffix(".png"))
    print(json.dumps(summary))


class Bench:
    """One checkpoint and one of its models, pruned again and again.

    Args:
        scratch: folder of pruned checkpoints and ONNX files.
        n: held-out prompts.
    """

    def __init__(self, checkpoint: Path, repository: Path, model: str, scratch: Path, n: int):
        self._checkpoint, self._repository, self._model = checkpoint, repository, model
        self._scratch, self._tasks = scratch, tasks(n)
        self._original = open_checkpoint(checkpoint)
        self._part = load_parts(self._original)[model]
        self._files: list[Path] = []

    def unpruned(self) -> dict[str, Any]:
        file = self._export(self._part, "0")
        self._files.append(file)
        quality = self._quality(file)
        return {"ratio": 0, "macs_removed": 0, "bytes": _size(file), "pruning": None,
                "pruned": quality, "recovered": quality, "distillation_error": None}  # fmt: skip

    def pruned(
        self, ratio: float, runs: Path, recovery: int, batch: int, bf16: bool
    ) -> dict[str, Any]:
        """Quality and size of the model without `ratio` of its MACs."""
        folder = self._scratch / f"{self._checkpoint.name}-{ratio}"
        console.print(f"{self._model} without {100 * ratio:g}% of its MACs")
        opened = prune_checkpoint(self._original, {self._model: ratio}, folder)
        pruning = pruning_of(opened.folders[SOURCE[self._model]])
        assert pruning is not None, "it was pruned on the line before"
        file = self._export(load_parts(opened)[self._model], str(ratio))
        self._files.append(file)
        point: dict[str, Any] = {
            "ratio": ratio,
            "macs_removed": round(100 * (1 - pruning.macs[1] / pruning.macs[0]), 1),
            "bytes": _size(file),
            "pruning": pruning.__dict__,
            "pruned": self._quality(file),
            "recovered": None,
            "distillation_error": None,
        }
        if recovery:
            run = Run(folder, runs, recovery, batch, bf16=bf16)
            errors = recover(run, self._checkpoint, [self._model])
            point["distillation_error"] = errors[self._model]
            learnt = load_parts(open_checkpoint(folder))[self._model]
            point["recovered"] = self._quality(self._export(learnt, f"{ratio}-recovered"))
        return point

    def step_times(self, turns: int) -> list[dict[int, float]]:
        """Median milliseconds of a call by batch, of every model that was pruned, in turns."""
        config = read_config(self._repository / self._model / "config.pbtxt")
        sessions = [open_session(file, config) for file in self._files]
        medians: list[dict[int, float]] = [{} for _ in sessions]
        for rows in BATCHES:
            feed = {k: v.numpy() for k, v in native_rows(self._part, rows).items()}
            seconds: list[list[float]] = [[] for _ in sessions]
            for turn in range(turns + 1):
                for session, taken in zip(sessions, seconds, strict=True):
                    started = time.perf_counter()
                    session.run(None, feed)
                    if turn:  # the first is warm-up
                        taken.append(time.perf_counter() - started)
            for found, taken in zip(medians, seconds, strict=True):
                found[rows] = round(1000 * statistics.median(taken), 3)
        return medians

    def _export(self, part: Part, name: str) -> Path:
        folder = self._scratch / f"onnx-{name}"
        folder.mkdir()
        to_onnx(part, folder / "model.onnx")
        return folder / "model.onnx"

    def _quality(self, file: Path) -> dict[str, object] | None:
        models = LocalModels(self._repository, {self._model: file})
        with local_engine(self._repository, models) as engine:
            pictures = paint(engine, [task.prompt for task in self._tasks])
        return share(
            score(task, read(picture)).all_correct
            for task, picture in zip(self._tasks, pictures, strict=True)
        )


def _check(checkpoint: Path, repository: Path, model: str, ratios: str) -> list[float]:
    """The ratios.

    Raises:
        ValueError: an option is not allowed.
    """
    if model not in SOURCE:
        raise ValueError(f"--model {model!r} is not one of {', '.join(SOURCE)}")
    try:
        shares = [float(word) for word in ratios.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < ratio < 1 for ratio in shares):
        raise ValueError(f"--ratios {ratios!r}: shares over 0 and under 1, with commas")
    manifest = repository / "MANIFEST.json"
    served = json.loads(manifest.read_text())["checkpoint"] if manifest.exists() else "nothing"
    if served != checkpoint.resolve().name:
        raise ValueError(f"--repository {repository} serves {served}, not {checkpoint.name}")
    return shares


def plot(points: list[dict[str, Any]], model: str, file: Path) -> None:
    """All-correct before and after recovery, and speed, against the MACs that were removed."""
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point["ratio"])
    removed = [point["macs_removed"] for point in points]
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    for key, label in (("pruned", "pruned"), ("recovered", "and recovered")):
        known = [(x, point[key]) for x, point in zip(removed, points, strict=True) if point[key]]
        x = [place for place, _ in known]
        y = np.array([cell["percent"] for _, cell in known])
        low, high = np.array([cell["interval"] for _, cell in known]).T
        quality.errorbar(x, y, (y - low, high - y), marker="o", capsize=3, label=label)
    for rows in BATCHES:
        y = [point["speedup"][rows] for point in points]
        speed.plot(removed, y, marker="o", label=f"batch {rows}")
    ideal = [1 / (1 - x / 100) for x in removed]
    speed.plot(removed, ideal, linestyle=":", color="gray", label="as MACs fall")
    quality.set(ylabel="pictures all correct, %", ylim=(0, None))
    speed.set(ylabel="steps a second, over unpruned")
    for axes in (quality, speed):
        axes.set(xlabel=f"MACs removed from {model}, %")
        axes.grid(alpha=0.3)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _size(file: Path) -> int:
    """Bytes of an ONNX file and its external data."""
    return sum(each.stat().st_size for each in file.parent.iterdir())


def _percent(cell: Mapping[str, object] | None) -> object:
    return cell["percent"] if cell else None


if __name__ == "__main__":
    typer.run(main)
