"""`python -m benchmarks.pruning`: the cost and gain of pruning a model, by pruning ratio.

Each ratio prunes the checkpoint anew; quality is measured before and after recovery by
distillation, the other models being those of the repository. The measure here is the PSNR of
pictures against the unpruned model's; an example of a checkpoint may pass a better one. Step times
are medians of calls that take turns with the unpruned model in one run. The result file is written
after every ratio, and with the step times at the end, when a plot goes beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console

from benchmarks.local_engine import local_engine
from benchmarks.machine import write_result
from export.checkpoint import open_checkpoint
from export.convert import to_onnx
from export.gate import PROMPTS
from export.macs import native_rows
from export.painting import paint
from export.part import Part
from export.pipeline import native_side
from export.prune import RatioError, prune_checkpoint
from export.repository import SOURCE, load_parts
from networks.loading import CheckpointError
from networks.pruned import pruning_of
from training.captioned import Captioned
from training.data import BadInput, Source
from training.preparation import Preparation
from training.recover import recover
from training.run import Run
from twinbrush.runtimes.onnx_runtime import LocalModels, open_session, read_config

BATCHES = (1, 16)
IDENTICAL = 100.0  # dB, of equal pictures
console = Console()
Cell = dict[str, Any]  # what a measure found, in JSON's types


class Measure(Protocol):
    """The quality of pictures, picture k being of prompt k and seed k.

    Attributes:
        prompts: to paint.
        key: of the number in a cell that `score` returns; with `interval` it has a range.
        label: of that number, for the plot.
        goals: for the result file, by model.
    """

    prompts: list[str]
    key: str
    label: str
    goals: dict[str, dict[str, float]]

    def start(self, pictures: list[np.ndarray]) -> None:
        """Takes the pictures of the unpruned model, before any `score`."""

    def score(self, pictures: list[np.ndarray]) -> Cell | None:
        """The quality of pictures; None if it cannot be measured."""


class Psnr:
    """Peak signal-to-noise ratio in dB of all pictures together against the unpruned model's."""

    key, label = "psnr", "PSNR against the unpruned model, dB"
    goals: dict[str, dict[str, float]] = {}  # noqa: RUF012

    def __init__(self, n: int):
        self.prompts = [PROMPTS[k % len(PROMPTS)] for k in range(n)]
        self._wanted: list[np.ndarray] = []

    def start(self, pictures: list[np.ndarray]) -> None:
        self._wanted = pictures

    def score(self, pictures: list[np.ndarray]) -> Cell | None:
        pairs = zip(pictures, self._wanted, strict=True)
        error = np.mean([np.square(a.astype(float) - b).mean() for a, b in pairs])
        psnr = 10 * np.log10(255**2 / max(float(error), 1e-9))
        return {"psnr": round(float(min(IDENTICAL, psnr)), 2), "n": len(pictures)}


@dataclass(frozen=True)
class Recovery:
    """How pruned models are distilled; `steps` is 0 for none, `source` may then be None."""

    steps: int
    batch: int
    bf16: bool
    runs: Path
    source: Source | None


def command(
    name: str,
    measure: Callable[[int], Measure],
    n: int,
    world: Source | None = None,
) -> Callable[..., None]:
    """The command `name`, of a measure on so many prompts.

    Args:
        n: prompts by default.
        world: recovery's data without `--data`.
    """

    def main(
        checkpoint: Annotated[Path, typer.Option(help="Unpruned checkpoint.")] = Path(
            "checkpoints/scenes-64"
        ),
        repository: Annotated[Path, typer.Option(help="Its export.")] = Path("model_repository"),
        model: Annotated[str, typer.Option(help=f"One of {', '.join(SOURCE)}.")] = "unet",
        ratios: Annotated[
            str, typer.Option(help="Shares of MACs, with commas.")
        ] = "0.15,0.3,0.45,0.6",
        recovery: Annotated[int, typer.Option(min=0, help="Distillation steps; 0 is none.")] = (
            2000 if world else 0
        ),
        batch: Annotated[int, typer.Option(min=1, help="Pictures a distillation step.")] = 64,
        bf16: Annotated[bool, typer.Option(help="bfloat16 products in distillation.")] = False,
        runs: Annotated[Path, typer.Option(help="Folder of recovery's saves.")] = Path(
            "runs/pruning"
        ),
        path: Annotated[
            Path | None, typer.Option("--data", help="Captioned pictures for recovery.")
        ] = None,
        n: Annotated[int, typer.Option(min=1, help="Prompts.")] = n,
        turns: Annotated[int, typer.Option(min=1, help="Calls of each model and batch.")] = 100,
        out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path(
            "benchmarks/results/pruning.json"
        ),
    ) -> None:
        """Curves of quality and speed against pruning ratio."""
        quality = measure(n)
        try:
            shares = _check(checkpoint, repository, model, ratios)
            source = world
            if path is not None:
                source = Captioned(path, Preparation(native_side(open_checkpoint(checkpoint))))
            if recovery and source is None:
                raise BadInput("--recovery needs --data: captioned pictures to distil on")
            result = Result(out, name, checkpoint.name, model, quality, (recovery, batch))
            with tempfile.TemporaryDirectory() as scratch:
                bench = Bench(checkpoint, repository, model, Path(scratch), quality)
                distil = Recovery(recovery, batch, bf16, runs, source)
                measure_ratios(bench, shares, distil, result)
                times = bench.step_times(turns)
        except (CheckpointError, ValueError) as error:
            sys.exit(f"error: {error}")
        result.finish(times)

    return main


class Result:
    """The result file, which is written again after every point."""

    def __init__(
        self,
        out: Path,
        name: str,
        checkpoint: str,
        model: str,
        quality: Measure,
        recovery: tuple[int, int],
    ):
        self._out, self._name, self._checkpoint, self._model = out, name, checkpoint, model
        self._quality, self._recovery = (
            quality,
            dict(zip(("steps", "batch"), recovery, strict=True)),
        )
        self.points: list[dict[str, Any]] = []
        self.unreachable: list[dict[str, Any]] = []

    def save(self) -> None:
        write_result(
            self._out, self._name, checkpoint=self._checkpoint, model=self._model,
            goals=self._quality.goals.get(self._model), n=len(self._quality.prompts),
            recovery=self._recovery, points=self.points, unreachable=self.unreachable,
        )  # fmt: skip

    def finish(self, times: list[dict[int, float]]) -> None:
        """Adds the step times of every point, draws the plot, and prints a summary."""
        for point, medians in zip(self.points, times, strict=True):
            point["step_ms"] = medians
            point["speedup"] = {b: round(times[0][b] / ms, 3) for b, ms in medians.items()}
        self.save()
        plot(self.points, self._model, self._out.with_suffix(".png"), self._quality)
        key = self._quality.key
        summary = {
            str(p["ratio"]): {
                "macs_removed": p["macs_removed"],
                "speedup": p["speedup"],
                key: [p[state] and p[state][key] for state in ("pruned", "recovered")],
            }
            for p in self.points
        }
        print(json.dumps(summary))


def measure_ratios(bench: Bench, shares: list[float], recovery: Recovery, result: Result) -> None:
    """Measures the unpruned model and every ratio, and saves after each."""
    result.points.append(bench.unpruned())
    result.save()
    for ratio in shares:
        try:
            result.points.append(bench.pruned(ratio, recovery))
        except RatioError as error:
            result.unreachable.append({"ratio": ratio, "reason": str(error)})
        result.save()


class Bench:
    """One checkpoint and one of its models, pruned again and again.

    Args:
        scratch: folder of pruned checkpoints and ONNX files.
    """

    def __init__(
        self, checkpoint: Path, repository: Path, model: str, scratch: Path, quality: Measure
    ):
        self._checkpoint, self._repository, self._model = checkpoint, repository, model
        self._scratch, self._measure = scratch, quality
        self._original = open_checkpoint(checkpoint)
        self._part = load_parts(self._original)[model]
        self._files: list[Path] = []

    def unpruned(self) -> dict[str, Any]:
        file = self._export(self._part, "0")
        self._files.append(file)
        pictures = self._paint(file)
        self._measure.start(pictures)
        quality = self._measure.score(pictures)
        return {"ratio": 0, "macs_removed": 0, "bytes": _size(file), "pruning": None,
                "pruned": quality, "recovered": quality, "distillation_error": None}  # fmt: skip

    def pruned(self, ratio: float, recovery: Recovery) -> dict[str, Any]:
        """Quality and size of the model without `ratio` of its MACs.

        Raises:
            RatioError: so much cannot be removed.
        """
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
            "pruned": self._measure.score(self._paint(file)),
            "recovered": None,
            "distillation_error": None,
        }
        if recovery.steps and recovery.source is not None:
            run = Run(
                folder, recovery.runs, recovery.steps, recovery.batch, bf16=recovery.bf16,
                source=recovery.source,
            )  # fmt: skip
            errors = recover(run, self._checkpoint, [self._model])
            point["distillation_error"] = errors[self._model]
            trained = load_parts(open_checkpoint(folder))[self._model]
            file = self._export(trained, f"{ratio}-recovered")
            point["recovered"] = self._measure.score(self._paint(file))
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

    def _paint(self, file: Path) -> list[np.ndarray]:
        models = LocalModels(self._repository, {self._model: file})
        with local_engine(self._repository, models) as engine:
            return paint(engine, self._measure.prompts)


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


def plot(points: list[dict[str, Any]], model: str, file: Path, measure: Measure) -> None:
    """Quality before and after recovery, and speed, against the MACs that were removed."""
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point["ratio"])
    removed = [point["macs_removed"] for point in points]
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    for key, label in (("pruned", "pruned"), ("recovered", "and recovered")):
        known = [(x, point[key]) for x, point in zip(removed, points, strict=True) if point[key]]
        x = [place for place, _ in known]
        y = np.array([cell[measure.key] for _, cell in known])
        ranges = [cell.get("interval", (cell[measure.key],) * 2) for _, cell in known]
        low, high = np.array(ranges).reshape(-1, 2).T
        quality.errorbar(x, y, (y - low, high - y), marker="o", capsize=3, label=label)
    for rows in BATCHES:
        # Keys are strings where the points were read from a result file.
        y = [point["speedup"].get(rows, point["speedup"].get(str(rows))) for point in points]
        speed.plot(removed, y, marker="o", label=f"batch {rows}")
    ideal = [1 / (1 - x / 100) for x in removed]
    speed.plot(removed, ideal, linestyle=":", color="gray", label="as MACs fall")
    quality.set(ylabel=measure.label, ylim=(0, None))
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


main = command("python -m benchmarks.pruning", Psnr, n=len(PROMPTS))

if __name__ == "__main__":
    typer.run(main)
