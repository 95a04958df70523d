"""TensorRT plans of exported models: `python -m export.tensorrt` or `--tensorrt`.

A plan serves only with the TensorRT and on the GPU that it was built with, so this needs
TensorRT's Python package, a GPU, and none of the exporter's packages. Precision stands in the
ONNX files. The same code drives TensorRT-RTX, which compiles ahead of time for other GPUs.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from export.staging import put_in_place, staging
from export.triton_config import MARKER
from twinbrush.config import PipelineConfig
from twinbrush.manifest import NAME, ManifestError, reading, sha256_of
from twinbrush.tensorrt import CONFIG_NAME, PLAN, Target, this_machine

ENGINE = "text_to_image_stream"
LOG_TAIL = 10  # lines of the builder's log that an error tells
CONFIG = """\
# Written with the plan. Everything but the tensors may be changed, and lasts until the next.
name: "{model}"
backend: "tensorrt"
default_model_filename: "{plan}"
max_batch_size: 0
instance_group [ {{ count: 1 kind: KIND_GPU }} ]

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
    """What the engine sends: rows of a call, and sides of a latent."""

    rows: Range
    side: Range


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


def engine_limits(repository: Path, pipeline: Path) -> Limits:
    """From the engine's `config.pbtxt` and a `pipeline.json`.

    Raises:
        TensorRTError: one of them is not there or does not say it.
    """
    file = repository / ENGINE / "config.pbtxt"
    pattern = r'key: "(max_rows|row_buckets)" value: \{ string_value: "([\d, ]*)" \}'
    given = dict(re.findall(pattern, _existing(file).read_text()))
    try:
        buckets = [int(size) for size in given["row_buckets"].split(",") if size.strip()]
        most = max([int(given["max_rows"]), *buckets])
    except (KeyError, ValueError):
        text = "max_rows, a whole number, and row_buckets, whole numbers with commas"
        raise TensorRTError(f"{file} must have the parameters {text}") from None
    try:
        config = PipelineConfig.load(pipeline)
    except ValueError as error:
        raise TensorRTError(str(error)) from error
    sides = (config.side_multiple, config.native_side, config.max_side)
    return Limits(
        rows=Range(1, max(1, most // 4), most),  # between one client and many
        side=Range(*(side // config.scale_factor for side in sides)),
    )


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise TensorRTError(f"{file} is not there")
    return file


def stage_plan(
    trt: Any, onnx: Path, repository: Path, stage: Path, limits: Limits, targets: Sequence[str] = ()
) -> Target:
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
    plan, timings = _build(
        trt, log, onnx, limits, cache.read_bytes() if cache.is_file() else b"", targets
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
    text = CONFIG.format(model=model, plan=PLAN) + MARKER + tensors
    (configs / f"{CONFIG_NAME}.pbtxt").write_text(text)
    return Target(trt.__version__, ",".join(targets) or this_machine().gpu)


def _build(
    trt: Any, log: Any, onnx: Path, limits: Limits, cache: bytes, targets: Sequence[str]
) -> tuple[Any, Any]:
    """The serialised plan, None where it cannot be built, and the timing cache."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        return None, None
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, limits))
    config.set_timing_cache(config.create_timing_cache(cache), True)  # True: also of another GPU
    if targets:
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    plan = builder.build_serialized_network(network, config)
    return plan, config.get_timing_cache().serialize()


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
    """The first axis of every input is the rows; any other that varies is a side."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes = [
            [
                size if size != -1 else getattr(limits.side if axis else limits.rows, end)
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
    manifest_file = repository / NAME
    if not manifest_file.is_file():
        raise TensorRTError(f"{repository} has no {NAME}: run `python -m export CHECKPOINT` first")
    with reading(manifest_file):
        manifest = json.loads(manifest_file.read_text())
        models = {line["model"]: (line, line["sha256"]) for line in manifest["models"]}
    for model in models:
        for name in ("config.pbtxt", "1/model.onnx"):
            _existing(repository / model / name)
    limits = engine_limits(repository, repository / ENGINE / "1" / "pipeline.json")
    with staging(repository) as stage:
        for model, (line, sha256) in models.items():
            version = Path(model, "1")
            onnx = repository / version / "model.onnx"
            line["plan"] = asdict(stage_plan(trt, onnx, repository, stage, limits, targets))
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
