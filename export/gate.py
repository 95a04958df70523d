"""The gate: what the optimised models paint, held against what the unoptimised ones paint.

Both run in the serving engine, in this process, on the same prompts and seeds. Where the
pictures are scenes that can be read back, the share that shows all its prompt says is counted
(`examples.scenes.quality`); where not, pictures are compared pixel by pixel. It knows which models
differ and nothing of how they were optimised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.convert import to_onnx
from export.repository import MODELS, load_parts
from twinbrush.engine.capacity import LEAST_ROWS
from twinbrush.engine.config import ENGINE, PipelineConfig
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import EngineError
from twinbrush.runtimes.onnx_runtime import LocalModels, read_config

SCENE_PROMPTS = 1000
READABLE = 10  # percent of the unoptimised pictures; under it a count says nothing
PROBE = 50  # scene prompts that tell whether pictures can be read
SHARED_SIDE = 256  # pixels; calls with more than one picture of larger ones only take memory here
IDENTICAL = 100.0  # dB, of equal pictures
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bicycle leaning on a white wall",
    "portrait of an old fisherman, oil on canvas",
    "a bowl of oranges and grapes on a wooden table",
    "a castle on a hill at sunset, fantasy art",
    "a cat sleeping on a stack of books",
    "a city street in the rain at night, neon lights",
    "a large blue circle left of a small yellow square",
)  # fmt: skip


class GateError(RuntimeError):
    """The optimised models lose more than is allowed, or cannot paint; the message says which."""


@dataclass(frozen=True)
class Limits:
    """What may be lost.

    Attributes:
        loss: points of pictures that show all their prompt says.
        psnr: dB that pictures must reach against the unoptimised, where they cannot be read.
        prompts: how many to paint; None is `SCENE_PROMPTS`, or `PROMPTS` once.
    """

    loss: float = 1.0
    psnr: float = 25.0
    prompts: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What a set of models scored.

    Attributes:
        measure: "all correct", in percent, or "psnr", in dB.
        before, after: unoptimised and optimised; `before` of psnr is that of equal pictures.
        allowed: the least that `after` may be.
        prompts: that were painted.
        alone: score of each optimised model among unoptimised ones, where it was needed.
    """

    measure: str
    before: float
    after: float
    allowed: float
    prompts: int
    alone: dict[str, float]

    @property
    def passed(self) -> bool:
        return self.after >= self.allowed

    def __str__(self) -> str:
        if self.measure == "psnr":
            text = f"pictures are {self.after:.1f} dB from the unoptimised"
            limit = f"--gate-psnr is {self.allowed:g}"
            alone = [f"{name} {score:.1f} dB" for name, score in self.alone.items()]
        else:
            text = f"all-correct went from {self.before:.1f}% to {self.after:.1f}%"
            limit = f"--gate-loss is {self.before - self.allowed:g} points"
            alone = [f"{name} {self.before - s:.1f} points" for name, s in self.alone.items()]
        costs = f"; alone: {', '.join(alone)}" if alone else ""
        return f"{text} on {self.prompts} prompts, {limit}{costs}"


class Gate:
    """Compares staged models with the unoptimised ones of `original`.

    Args:
        original: the checkpoint before it was optimised.
        optimised: models that differ from it.
        repository: where staged models will go; its configurations, and the models that stay.

    Attributes:
        verdict: on the last stage, None before there is one.
    """

    def __init__(
        self, original: Checkpoint, optimised: Sequence[str], repository: Path, limits: Limits
    ):
        self._original, self._optimised = original, list(optimised)
        self._repository, self._limits = repository, limits
        self.verdict: Verdict | None = None

    def __call__(self, stage: Path) -> dict[str, Any]:
        """The verdict on what stands in `stage`, for the manifest.

        Raises:
            GateError: it loses more than the limits allow, or no picture can be painted.
        """
        files = {name: stage / name / "1" / "model.onnx" for name in MODELS}
        staged = {name: file for name, file in files.items() if file.exists()}
        with tempfile.TemporaryDirectory(dir=stage.parent) as scratch:
            plain = staged | self._export_plain(Path(scratch))
            measure = self._measure(stage, plain)
            after = measure.score(self._paint(stage, staged, measure.prompts))
            verdict = self.verdict = Verdict(
                measure.name, measure.before, after, measure.allowed, len(measure.prompts), {}
            )
            if verdict.passed:
                return asdict(verdict)
            for name in self._optimised:
                one = plain | {name: staged[name]}
                verdict.alone[name] = measure.score(self._paint(stage, one, measure.prompts))
        raise GateError(f"the gate refuses: {verdict}")

    def _export_plain(self, folder: Path) -> dict[str, Path]:
        parts = load_parts(self._original)
        files = {}
        for name in self._optimised:
            (folder / name).mkdir()
            files[name] = folder / name / "model.onnx"
            to_onnx(parts[name], files[name])
        return files

    def _measure(self, stage: Path, plain: dict[str, Path]) -> AllCorrect | Psnr:
        """Counts where the unoptimised models paint scenes that can be read."""
        side = PipelineConfig.load(stage / ENGINE / "pipeline.json").native_side
        measure = AllCorrect(self._limits)
        if side == measure.side:
            probe = self._paint(stage, plain, measure.prompts[:PROBE])
            if measure.score(probe) >= READABLE:
                measure.set_before(self._paint(stage, plain, measure.prompts))
                return measure
        other = Psnr(self._limits)
        other.set_before(self._paint(stage, plain, other.prompts))
        return other

    def _paint(self, stage: Path, files: dict[str, Path], prompts: list[str]) -> list[np.ndarray]:
        """Picture k has seed k; models that are not in `files` are the repository's."""
        from examples.scenes.quality import paint

        try:
            config = read_config(self._repository / ENGINE.parent / "config.pbtxt")
            large = PipelineConfig.load(stage / ENGINE / "pipeline.json").native_side > SHARED_SIDE
            if large and "max_rows" in config.get("parameters", {}):
                config["parameters"]["max_rows"]["string_value"] = str(LEAST_ROWS)
            engine = Engine.of_model(stage / ENGINE, config, LocalModels(self._repository, files))
            with closing(engine):
                return paint(engine, prompts)
        except (EngineError, RuntimeError, ValueError) as error:
            raise GateError(f"the gate cannot paint: {error}") from error


class AllCorrect:
    """Percent of pictures of scenes that show all their prompt says."""

    name = "all correct"

    def __init__(self, limits: Limits):
        from examples.scenes.quality import tasks
        from examples.scenes.scenes import SIDE

        self.side, self._limits, self._tasks = SIDE, limits, tasks(limits.prompts or SCENE_PROMPTS)
        self.prompts = [task.prompt for task in self._tasks]
        self.before = 0.0

    @property
    def allowed(self) -> float:
        return self.before - self._limits.loss

    def set_before(self, pictures: list[np.ndarray]) -> None:
        self.before = self.score(pictures)

    def score(self, pictures: list[np.ndarray]) -> float:
        """Of the pictures of the first prompts."""
        from examples.scenes.quality import score
        from examples.scenes.reader import read

        tasks = self._tasks[: len(pictures)]
        right = [score(t, read(p)).all_correct for t, p in zip(tasks, pictures, strict=True)]
        return 100 * sum(right) / len(right)


class Psnr:
    """Peak signal-to-noise ratio in dB of all pictures together against the unoptimised.

    A mean of each one's would let equal ones hide that others are broken.
    """

    name, before = "psnr", IDENTICAL

    def __init__(self, limits: Limits):
        self.allowed = limits.psnr
        self.prompts = [PROMPTS[k % len(PROMPTS)] for k in range(limits.prompts or len(PROMPTS))]
        self._wanted: list[np.ndarray] = []

    def set_before(self, pictures: list[np.ndarray]) -> None:
        self._wanted = pictures

    def score(self, pictures: list[np.ndarray]) -> float:
        pairs = zip(pictures, self._wanted, strict=True)
        error = np.mean(
            [np.square(picture.astype(float) - wanted).mean() for picture, wanted in pairs]
        )
        return float(min(IDENTICAL, 10 * np.log10(255**2 / max(error, 1e-9))))
