"""TensorRT plans of exported models: `python -m export.tensorrt` or `--tensorrt`.

A plan serves only with the TensorRT and on the GPU that it was built with, so this needs
TensorRT's Python package, a GPU, and none of the exporter's packages. Precision stands in the
ONNX files. The same code drives TensorRT-RTX, which compiles ahead of time for other GPUs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from export.staging import put_in_place, staging
from export.triton_config import MARKER
from twinbrush.engine.capacity import Capacity, decoder_pictures
from twinbrush.engine.config import ENGINE, TOKENS, PipelineConfig
from twinbrush.server.manifest import NAME, ManifestError, reading, sha256_of
from twinbrush.server.plans import (
    CONFIG_NAME,
    PLAN,
    Plan,
    engine_calls,
    engine_config,
    this_machine,
)

LOG_TAIL = 10  # lines of the builder's log that an error tells
CONFIG = """\
# Written with the plan. Everything but the tensors may be changed, and lasts until the next.
name: "{model}"
backend: "tensorrt"
default_model_filename: "{plan}"
max_batch_size: 0
instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {profiles} ] }} ]
# Each profile holds the memory of its own sizes, not of the largest.
parameters {{
  key: "execution_context_allocation_strategy"
  value: {{ string_value: "ON_PROFILE_CHANGE" }}
}}

"""


class TensorRTError(RuntimeError):
    """A plan cannot be built; the message says why."""


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of an axis; kernels are chosen for the usual one."""

    low: int
    usual: int
    high: int


@dataclass(frozen=True)
class Limits:
    """Of one optimisation profile: rows of a call, sides of a latent, and tokens of a text."""

    rows: Range
    side: Range
    tokens: Range


@dataclass(frozen=True)
class Wanted:
    """What plans are to take.

    Attributes:
        calls: of the engine, by ascending side.
        pipeline: the checkpoint that it serves.
    """

    calls: tuple[Capacity, ...]
    pipeline: PipelineConfig

    def profiles(self, model: str) -> list[Limits]:
        """One for each size of calls; kernels are chosen for its largest pictures.

        One for all would have to take as many of the largest as of the smallest, where tensors
        have more elements than convolutions take.
        """
        cells, length = self.pipeline.scale_factor, self.pipeline.chunk_length
        tokens = Range(length, length, length * self.pipeline.max_chunks)
        found = []
        for call in self.calls:
            most = decoder_pictures(call.rows) if model == "vqgan_decoder" else call.rows
            usual = max(1, most // 4)  # between one client and many
            low, high = self.pipeline.side_multiple // cells, call.side // cells
            found.append(Limits(Range(1, usual, most), Range(low, high, high), tokens))
        return found


def load_tensorrt() -> Any:
    """TensorRT's Python module.

    Raises:
        TensorRTError: it is not installed, or there is no GPU to build for.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        text = f"plans need TensorRT's Python package, which is not here ({error})"
        how = "with `pip install tensorrt==VERSION`, that of its libnvinfer, if it has none"
        raise TensorRTError(f"{text}: build them in NVIDIA's Triton container, {how}") from error
    if this_machine().gpu is None:
        raise TensorRTError("plans are built on the GPU that serves them, and there is none here")
    return trt


def wanted_by_engine(repository: Path, pipeline: Path) -> Wanted:
    """From the engine's `config.pbtxt` and a `pipeline.json`.

    Raises:
        TensorRTError: one of them is not there or does not say it.
    """
    config = _existing(engine_config(repository))
    try:
        loaded = PipelineConfig.load(pipeline)
        return Wanted(engine_calls(config, loaded), loaded)
    except ValueError as error:
        raise TensorRTError(str(error)) from error


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise TensorRTError(f"{file} is not there")
    return file


def stage_plan(
    trt: Any, onnx: Path, repository: Path, stage: Path, wanted: Wanted, targets: Sequence[str] = ()
) -> Plan:
    """Builds the plan of `…/MODEL/1/model.onnx` and its `configs/tensorrt.pbtxt` into `stage`.

    The builder's log and timing cache lie beside the plan.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        targets: compute capabilities (`SM89`) to compile for, with TensorRT-RTX alone; without
            any, it is for the GPU of this machine.

    Raises:
        TensorRTError: with the builder's first error, and the last lines of its log.
    """
    model = onnx.parent.parent.name
    folder, configs = stage / model / "1", stage / model / "configs"
    for made in (folder, configs):
        made.mkdir(parents=True, exist_ok=True)
    cache = repository / model / "1" / "timing.cache"
    log = _log(trt)
    profiles = wanted.profiles(model)
    plan, timings, count = _build(
        trt, log, onnx, profiles, cache.read_bytes() if cache.is_file() else b"", targets
    )
    if plan is None:
        text = f"TensorRT cannot build {model}: {log.first_error}; its log ends"
        raise TensorRTError("\n".join([text, *log.lines[-LOG_TAIL:]]))
    (folder / "tensorrt.log").write_text("\n".join(log.lines) + "\n")
    (folder / PLAN).write_bytes(plan)
    (folder / "timing.cache").write_bytes(timings)
    tensors = (repository / model / "config.pbtxt").read_text().partition(MARKER)[2]
    staged = stage / model / "config.pbtxt"
    if staged.is_file():
        tensors = staged.read_text().partition(MARKER)[2]
    names = ", ".join(f'"{number}"' for number in range(count))
    text = CONFIG.format(model=model, plan=PLAN, profiles=names) + MARKER + tensors
    (configs / f"{CONFIG_NAME}.pbtxt").write_text(text)
    return Plan(trt.__version__, ",".join(targets) or this_machine().gpu, wanted.calls)


def _build(
    trt: Any, log: Any, onnx: Path, profiles: Sequence[Limits], cache: bytes, targets: Sequence[str]
) -> tuple[Any, Any, int]:
    """The serialised plan, None where it cannot be built, the timing cache, and its profiles."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        return None, None, 0
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    shapes = [tuple(network.get_input(i).shape) for i in range(network.num_inputs)]
    if not any(-1 in shape[1:] for shape in shapes):  # texts: the first takes the most rows
        profiles = profiles[:1]
    for limits in profiles:
        config.add_optimization_profile(_profile(builder, network, limits))
    config.set_timing_cache(config.create_timing_cache(cache), True)  # True: also of another GPU
    if targets:
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    plan = builder.build_serialized_network(network, config)
    return plan, config.get_timing_cache().serialize(), len(profiles)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.lines: list[str] = []
            self.first_error = ""

        def log(self, severity, text):
            self.lines.append(f"{severity.name}: {text}")
            if severity <= trt.ILogger.ERROR and not self.first_error:
                self.first_error = " ".join(text.split())

    return Log()


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allows primitive kernels where TensorRT has no fused one for an attention's shape."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, limits: Limits) -> Any:
    """The first axis of every input is the rows; any other that varies is a side, or tokens."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        within = limits.tokens if tensor.name == TOKENS else limits.side
        shapes = [
            [
                size if size != -1 else getattr(within if axis else limits.rows, end)
                for axis, size in enumerate(tensor.shape)
            ]
            for end in ("low", "usual", "high")
        ]
        profile.set_shape(tensor.name, *shapes)
    return profile


def add_plans(trt: Any, repository: Path, targets: Sequence[str] = ()) -> list[str]:
    """Builds the plans of every model of an exported repository, and records them.

    Gives the names of the models. When one cannot be built, the repository stays as it was.

    Raises:
        TensorRTError: nothing was exported yet, a file is not there, or a plan cannot be built.
        ManifestError: the manifest cannot be read.
        OSError: the disk is full, or the repository cannot be written.
    """
    if not (repository / NAME).is_file():
        raise TensorRTError(f"{repository} has no {NAME}: run `python -m export CHECKPOINT` first")
    with staging(repository) as stage:  # from here on no export changes what is read
        with reading(repository / NAME):
            manifest = json.loads((repository / NAME).read_text())
            models = {line["model"]: (line, line["sha256"]) for line in manifest["models"]}
        for model in models:
            for name in ("config.pbtxt", "1/model.onnx"):
                _existing(repository / model / name)
        wanted = wanted_by_engine(repository, repository / ENGINE / "pipeline.json")
        for model, (line, sha256) in models.items():
            version = Path(model, "1")
            onnx = repository / version / "model.onnx"
            line["plan"] = asdict(stage_plan(trt, onnx, repository, stage, wanted, targets))
            sha256[PLAN] = sha256_of(stage / version / PLAN)
        (stage / NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        put_in_place(stage, repository)
    return [*models]


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
) -> None:
    """Builds TensorRT plans beside the ONNX files, for this machine's TensorRT and GPU."""
    try:
        models = add_plans(load_tensorrt(), repository)
    except (TensorRTError, ManifestError) as error:
        typer.echo(f"no plans were built: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        text = f"cannot write into {repository}: {error.strerror or error}"
        typer.echo(f"no plans were built: {text}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"plans of {', '.join(models)}: serve them with --config-name {CONFIG_NAME}")


if __name__ == "__main__":
    typer.run(main)
