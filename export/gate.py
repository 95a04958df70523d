"""The gate: compares what the optimised models paint with what the unoptimised ones paint.

Both run in the serving engine, in this process, on the same prompts and seeds. What is measured
on the pictures is an argument; `psnr` here compares them pixel by pixel. The gate knows which
models differ, and nothing of how they were optimised or of what the pictures show.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.checkpoint import Checkpoint
from export.convert import to_onnx
from export.cpu_runtime import without_accelerator
from export.painting import paint
from export.repository import ALL_MODELS, load_outlines, load_part
from twinbrush.engine.capacity import LEAST_ROWS
from twinbrush.engine.config import ENGINE, PipelineConfig
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import EngineError
from twinbrush.runtimes.onnx_runtime import LocalModels, read_config

SHARED_SIDE = 256  # pixels; a call holds a single larger picture, for more only take memory here
IDENTICAL = 100.0  # dB, of equal pictures
LEAST_PSNR = 25.0  # dB
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
class Verdict:
    """The scores of a set of models.

    Attributes:
        measure: name of the measure, which says what the scores count.
        before, after: scores of the unoptimised and of the optimised models.
        allowed: the least that `after` may be.
        prompts: number of prompts painted.
        alone: score of each optimised model among unoptimised ones; empty where the gate passes.
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


class Measure(Protocol):
    """A score of pictures, higher is better.

    Attributes:
        name: for the manifest.
        prompts: to paint; picture k has seed k.
        before: score of the unoptimised models.
        allowed: the least that the optimised models may score.
    """

    name: str
    prompts: list[str]

    @property
    def before(self) -> float: ...

    @property
    def allowed(self) -> float: ...

    def score(self, pictures: list[np.ndarray]) -> float:
        """The score of pictures (H, W, 3) uint8 of the first prompts."""
        ...

    def describe(self, verdict: Verdict) -> str:
        """The verdict in a sentence, with the limit and what each model costs alone."""
        ...


Paint = Callable[[list[str]], list[np.ndarray]]
# Makes the measure of a repository, with the painter of its unoptimised models.
MakeMeasure = Callable[[PipelineConfig, Paint], Measure]


class Gate:
    """Compares staged models with the unoptimised ones of `original`.

    Args:
        original: the checkpoint before it was optimised.
        optimised: models that differ from it.
        repository: where staged models will go; supplies configurations and the kept models.
        make_measure: makes the measure.

    Attributes:
        summary: the last verdict in a sentence, empty before the first.
    """

    def __init__(
        self,
        original: Checkpoint,
        optimised: Sequence[str],
        repository: Path,
        make_measure: MakeMeasure,
    ):
        self._original, self._optimised = original, list(optimised)
        self._repository, self._make_measure = repository, make_measure
        self.summary = ""

    def __call__(self, stage: Path) -> dict[str, Any]:
        """The verdict on the models in `stage`, for the manifest.

        Raises:
            GateError: they lose more than the limits allow, or no picture can be painted.
        """
        files = {name: stage / name / "1" / "model.onnx" for name in ALL_MODELS}
        staged = {name: file for name, file in files.items() if file.exists()}
        configs = {name: stage / name / "config.pbtxt" for name in staged}
        with tempfile.TemporaryDirectory(dir=stage.parent) as scratch:
            plain = staged | self._export_plain(Path(scratch))
            plain_configs = self._plain_configs(configs, Path(scratch))
            config = PipelineConfig.load(stage / ENGINE / "pipeline.json")
            measure = self._make_measure(
                config, lambda texts: self._paint(stage, plain, plain_configs, texts)
            )
            after = measure.score(self._paint(stage, staged, configs, measure.prompts))
            verdict = Verdict(
                measure.name, measure.before, after, measure.allowed, len(measure.prompts), {}
            )
            if not verdict.passed:
                for name in self._optimised:
                    mixed = plain | {name: staged[name]}
                    mixed_configs = plain_configs | {name: configs[name]}
                    pictures = self._paint(stage, mixed, mixed_configs, measure.prompts)
                    verdict.alone[name] = measure.score(pictures)
        self.summary = measure.describe(verdict)
        if not verdict.passed:
            raise GateError(f"the gate refuses: {self.summary}")
        return asdict(verdict)

    def _export_plain(self, folder: Path) -> dict[str, Path]:
        outlines, files = load_outlines(self._original), {}
        for name in self._optimised:
            (folder / name).mkdir()
            files[name] = folder / name / "model.onnx"
            part = load_part(self._original, name, outlines)
            to_onnx(part, files[name])
            part.drop_weights()
        return files

    def _plain_configs(self, staged: dict[str, Path], folder: Path) -> dict[str, Path]:
        """Configurations of all models without an accelerator of the CPU, in `folder`."""
        own = {path.parent.name: path for path in self._repository.glob("*/config.pbtxt")}
        written = {}
        for name, path in (own | staged).items():
            written[name] = folder / f"{name}.pbtxt"
            written[name].write_text(without_accelerator(path.read_text()))
        return written

    def _paint(
        self, stage: Path, files: dict[str, Path], configs: dict[str, Path], prompts: list[str]
    ) -> list[np.ndarray]:
        """Picture k has seed k; models that are in neither mapping are the repository's."""
        try:
            config = read_config(self._repository / ENGINE.parent / "config.pbtxt")
            large = PipelineConfig.load(stage / ENGINE / "pipeline.json").native_side > SHARED_SIDE
            if large and "max_rows" in config.get("parameters", {}):
                config["parameters"]["max_rows"]["string_value"] = str(LEAST_ROWS)
            engine = Engine.of_model(
                stage / ENGINE, config, LocalModels(self._repository, files, configs=configs)
            )
            with closing(engine):
                return paint(engine, prompts)
        except (EngineError, RuntimeError, ValueError) as error:
            raise GateError(f"the gate cannot paint: {error}") from error


class Psnr:
    """Peak signal-to-noise ratio in dB of all pictures together against the unoptimised.

    A mean over pictures would let equal ones hide a broken one.
    """

    name, before = "psnr", IDENTICAL

    def __init__(self, least: float = LEAST_PSNR, prompts: int | None = None):
        self.allowed = least
        self.prompts = [PROMPTS[k % len(PROMPTS)] for k in range(prompts or len(PROMPTS))]
        self._wanted: list[np.ndarray] = []

    def set_before(self, pictures: list[np.ndarray]) -> None:
        self._wanted = pictures

    def score(self, pictures: list[np.ndarray]) -> float:
        pairs = zip(pictures, self._wanted, strict=True)
        error = np.mean(
            [np.square(picture.astype(float) - wanted).mean() for picture, wanted in pairs]
        )
        return float(min(IDENTICAL, 10 * np.log10(255**2 / max(error, 1e-9))))

    def describe(self, verdict: Verdict) -> str:
        alone = [f"{name} {score:.1f} dB" for name, score in verdict.alone.items()]
        return (
            f"pictures are {verdict.after:.1f} dB from the unoptimised"
            f" on {verdict.prompts} prompts, --gate-psnr is {verdict.allowed:g}"
            + (f"; alone: {', '.join(alone)}" if alone else "")
        )


def psnr(least: float = LEAST_PSNR, prompts: int | None = None) -> MakeMeasure:
    """A measure that fits every checkpoint: the pictures themselves.

    Args:
        least: dB that the pictures must reach.
        prompts: number of prompts; None is each of `PROMPTS` once.
    """

    def make(config: PipelineConfig, paint_unoptimised: Paint) -> Psnr:
        measure = Psnr(least, prompts)
        measure.set_before(paint_unoptimised(measure.prompts))
        return measure

    return make
