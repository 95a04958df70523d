"""Building a model repository: every model of a checkpoint, converted, compared, recorded."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from export import bert, clip_text, clip_text_2, fusion, pipeline, unet, vqgan_decoder
from export.checkpoint import Checkpoint
from export.checks import check_values
from export.convert import OPSET, expected_outputs, parity_error, to_onnx
from export.cpu_runtime import Choice, CpuRuntime, choose, with_accelerator, without_accelerator
from export.kept import (
    RepositoryError,
    check_loras,
    check_tokenizers,
    configuration,
    kept_lines,
)
from export.macs import Work, count_work
from export.memory import Growth, MeasureError, fit, measure
from export.part import Part
from export.precision import Precision, halve
from export.resources import check_resources
from export.sizes import side_multiple
from export.staging import put_in_place, staging
from export.tensorrt import Wanted, stage_plan, wanted_by_engine
from export.triton_config import with_tensors
from export.unet import MAX_CHUNKS
from networks.loading import CheckpointError
from networks.pruned import Pruning, pruning_of
from twinbrush.engine.config import ENGINE
from twinbrush.engine.memory import DECODER, UNET
from twinbrush.server.manifest import NAME as MANIFEST
from twinbrush.server.manifest import sha256_of
from twinbrush.server.plans import PLAN

log = logging.getLogger(__name__)
MODELS = ("clip_text", "bert", "fusion", "unet", "vqgan_decoder")
ALL_MODELS = ("clip_text", "clip_text_2", *MODELS[1:])
# The part of a checkpoint that each model is made of.
PART_OF = {
    "clip_text": "text_encoder",
    "clip_text_2": "text_encoder_2",
    "bert": "bert",
    "fusion": "fusion",
    "unet": "unet",
    "vqgan_decoder": "vae",
}
# The part of a checkpoint that holds each model that can be pruned.
SOURCE = {
    "clip_text": "text_encoder",
    "bert": "bert",
    "unet": "unet",
    "vqgan_decoder": "vae",
}
FRONT_DOORS = ("text_to_image", ENGINE.parent.name)
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ModelReport:
    """One line of the manifest.

    Attributes:
        parameters: how many the network has.
        macs: multiply-accumulates of one row at the size that it was trained on.
        pruning: what was removed from it, None where nothing was.
        loras: name, SHA-256 and scale of each LoRA file fused into it.
        lora_set: the same of each LoRA that requests can switch on in it.
        bytes: of the ONNX file and its external data.
        sha256: of each file, by name.
        precision: that it computes in.
        nodes_traced, nodes: of the graph as PyTorch traced it, and as it is served.
        error: against PyTorch, as a share of the largest output.
        seconds: that its export took.
        checkpoint: name of the one that it was exported from.
        revisions: commit of each source of that checkpoint that came from the hub, by hub id.
        tools: versions of the libraries that exported it.
        plan: TensorRT and GPU that its plan was made for, where it has one.
        cpu_runtime: what computes it on a CPU, with what was measured; None without a choice.
    """

    model: str
    parameters: int
    macs: int
    pruning: Pruning | None
    loras: list[dict[str, Any]]
    lora_set: list[dict[str, Any]]
    bytes: int
    sha256: dict[str, str]
    precision: str
    opset: int
    nodes_traced: int
    nodes: int
    error: float
    seconds: float
    checkpoint: str
    revisions: dict[str, str]
    tools: dict[str, str]
    plan: dict[str, str] | None = None
    cpu_runtime: Choice | None = None


def load_parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """All served models of a checkpoint, each held against those it is fed by."""
    parts: dict[str, Part] = {}
    for name in models_of(checkpoint):
        parts[name] = load_part(checkpoint, name, parts)
    return parts


def load_outlines(checkpoint: Checkpoint) -> dict[str, Part]:
    """All served models without their weights."""
    return load_parts(replace(checkpoint, hollow=True))


def load_part(checkpoint: Checkpoint, name: str, others: Mapping[str, Part]) -> Part:
    """One served model of a checkpoint, held against those of the `others` that it is fed by."""
    towers = [others[tower] for tower in ("clip_text", "clip_text_2") if tower in others]
    match name:
        case "clip_text":
            return clip_text.part(checkpoint)
        case "clip_text_2":
            return clip_text_2.part(checkpoint)
        case "bert":
            return bert.part(checkpoint)
        case "fusion":
            return fusion.part(checkpoint, towers, others.get("bert"))
        case "unet":
            pooled = towers[1].outputs["text_embeds"] if len(towers) > 1 else None
            return unet.part(checkpoint, others["fusion"], pooled)
        case _:
            return vqgan_decoder.part(checkpoint, others[UNET].outputs["model_output"].axes[0])


def models_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The models that serve a checkpoint, in the order in which they run."""
    optional = {"clip_text_2", "bert"}
    return tuple(
        name for name in ALL_MODELS if name not in optional or PART_OF[name] in checkpoint.folders
    )


@dataclass(frozen=True)
class Build:
    """Where and how models are built.

    Attributes:
        repository: holds the `config.pbtxt` files, and what an earlier export left.
        stage: folder that everything is written into first.
        precision: of the models.
        trt: TensorRT's module, or None where no plans are built.
        profiles: what the plans must cover; None without `trt`.
        cpu_runtime: how the runtime of the CPU is chosen.
    """

    repository: Path
    stage: Path
    precision: Precision
    trt: Any = None
    profiles: Wanted | None = None
    cpu_runtime: CpuRuntime = CpuRuntime.ONNXRUNTIME


def build(
    checkpoint: Checkpoint,
    repository: Path,
    progress: Callable[[str], None] = lambda model: None,
    only: Sequence[str] | None = None,
    precision: Precision = Precision.FP32,
    trt: Any = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
    cpu_runtime: CpuRuntime = CpuRuntime.ONNXRUNTIME,
) -> list[ModelReport]:
    """Exports a checkpoint into a repository that has its folders and `config.pbtxt` files.

    Without `only`, every model of the checkpoint is built; with it, the other models stay as an
    earlier export left them. With `trt`, TensorRT's module, every model gets a plan too. `check`
    receives the stage before it takes its place; an exception of it stops the export, its result
    goes into the manifest. Returns the reports of the models that were built.

    Raises:
        CheckpointError: the checkpoint cannot be exported, or does not fit the models that stay.
        RepositoryError: the repository lacks a file, or its manifest cannot be read.
        ConversionError: PyTorch cannot make an ONNX graph of a model.
        ParityError: the outputs of a model are not those of its original.
        TensorRTError: a plan cannot be built.
        CpuRuntimeError: the wanted runtime cannot compute a model.
        ResourceError: the machine has not enough memory or disk.
        OSError: the disk is full, or the repository cannot be written.
    """
    present = models_of(checkpoint)
    only = present if only is None else only
    if strange := [name for name in only if name not in present]:
        raise CheckpointError(f"{checkpoint.name} has no {strange[0]}: it has {', '.join(present)}")
    _check_configurations(repository)
    check_machine(checkpoint, repository, only, precision)
    outlines = load_outlines(checkpoint)
    kept = kept_lines(outlines, repository, only)
    check_loras(kept, repository, checkpoint, PART_OF)
    check_values(checkpoint, {PART_OF[name] for name in (*only, DECODER)})
    with staging(repository) as stage:
        (stage / ENGINE).mkdir(parents=True)
        decoder = load_part(checkpoint, DECODER, outlines)
        pipeline.write(checkpoint, outlines | {DECODER: decoder}, stage / ENGINE)
        check_tokenizers(kept, repository, stage)
        profiles = wanted_by_engine(repository, stage / ENGINE / "pipeline.json") if trt else None
        target = Build(repository, stage, precision, trt, profiles, cpu_runtime)
        reports, works = [], {}
        for name in only:
            progress(name)
            # One part at a time has its weights in memory; the decoder's are few.
            part = decoder if name == DECODER else load_part(checkpoint, name, outlines)
            report, works[name] = _build_model(checkpoint, part, target)
            reports.append(report)
        progress("memory")
        others = sum(r.bytes for r in reports if r.model not in (UNET, DECODER))
        others += sum(ln["bytes"] for name, ln in kept.items() if name not in (UNET, DECODER))
        growth = partial(_growth, checkpoint, outlines, works)
        pipeline.add_memory(stage / ENGINE, _memory(target, growth, others))
        _write_manifest(stage, checkpoint, kept, reports, check(stage) if check else None)
        put_in_place(stage, repository, _absent(present))
    return reports


def growth_of(checkpoint: Checkpoint, part: Part, work: Work) -> Growth:
    """What decides how the memory of a model grows with the size of pictures."""
    multiple = side_multiple(checkpoint.config("unet"))
    tokens = part.tokens * MAX_CHUNKS if part.tokens else 1
    side = part.side or (1, 1)
    return Growth(side, multiple, work.macs, work.weights, work.pairs, tokens)


def _growth(
    checkpoint: Checkpoint, outlines: Mapping[str, Part], works: Mapping[str, Work], name: str
) -> Growth:
    """Of a model, also where it is not among those that were built, whose works are known."""
    work = works.get(name) or count_work(load_part(checkpoint, name, outlines))
    return growth_of(checkpoint, outlines[name], work)


def _memory(
    target: Build, growth_of_model: Callable[[str], Growth], others: float
) -> dict[str, Any] | None:
    """`memory` of `pipeline.json`; a model that stays keeps what an earlier export measured.

    None where it cannot be measured; calls then have rows by their size alone.
    """
    earlier = pipeline.memory_of(target.repository / ENGINE)
    found: dict[str, Any] = {"others": others}
    for name in (UNET, DECODER):
        root = target.stage if (target.stage / name / "1").is_dir() else target.repository
        if root is target.repository and name in earlier:
            found[name] = earlier[name]
            continue
        config = target.stage / name / "config.pbtxt"
        config = config if config.is_file() else target.repository / name / "config.pbtxt"
        growth = growth_of_model(name)
        try:
            file = root / name / "1" / "model.onnx"
            measured = measure(file, config, growth.sides(), growth.tokens)
        except MeasureError as error:
            log.error("memory was not measured, and does not bound calls: %s", error)
            return None
        found[name] = fit(measured, growth)
    return found


def _absent(present: Container[str]) -> list[Path]:
    """Files and folders of the models that a checkpoint does not have."""
    models = [name for name in ALL_MODELS if name not in present]
    return [Path(name) for name in models] + [ENGINE / pipeline.TOKENIZER[name] for name in models]


def _check_configurations(repository: Path) -> None:
    for name in (*FRONT_DOORS, "clip_text", "fusion", "unet", "vqgan_decoder"):
        if not (config := repository / name / "config.pbtxt").is_file():
            text = f"{config} is not there: copy it from this project's model_repository"
            raise RepositoryError(text)


def _write_manifest(
    stage: Path,
    checkpoint: Checkpoint,
    kept: dict[str, dict],
    reports: list[ModelReport],
    gate: dict[str, Any] | None,
) -> None:
    lines = kept | {report.model: asdict(report) for report in reports}
    manifest = {
        "checkpoint": checkpoint.name,
        "models": [lines[name] for name in models_of(checkpoint)],
        "files": {
            str(file.relative_to(stage)): sha256_of(file)
            for file in sorted((stage / ENGINE).iterdir())
        },
        "gate": gate,
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def check_machine(
    checkpoint: Checkpoint,
    repository: Path,
    only: Sequence[str],
    precision: Precision,
    pruned: Sequence[str] = (),
) -> None:
    """Holds what `build` needs of memory and disk against what is free.

    Args:
        checkpoint, repository, only, precision: as in `build`.
        pruned: models that are pruned before, which are in memory together.

    Raises:
        ResourceError: there is not enough.
    """
    folders = {model: checkpoint.folders.get(part) for model, part in PART_OF.items()}
    built = [folder for model in only if (folder := folders[model])]
    together = [folder for model in pruned if (folder := folders[model])]
    check_resources(built, repository, precision, together)


def _build_model(checkpoint: Checkpoint, part: Part, target: Build) -> tuple[ModelReport, Work]:
    """Writes a model into the stage. The part's weights are gone afterwards.

    PyTorch runs before the weights are halved, and ONNX Runtime after they are gone, so that
    memory holds one copy of them at a time.
    """
    started = time.monotonic()
    folder = target.stage / part.name / "1"
    folder.mkdir(parents=True)
    expected = expected_outputs(part)
    if target.precision is Precision.FP16:
        halve(part)
    nodes_traced, nodes = to_onnx(part, folder / "model.onnx", target.precision)
    work = count_work(part)
    part.drop_weights()
    error = parity_error(part, folder / "model.onnx", target.precision, expected)
    config = without_accelerator(configuration(target.repository, part.name))
    config = with_tensors(config, part)
    choice = choose(part, folder / "model.onnx", config, target.cpu_runtime)
    if choice is not None and choice.runtime == "openvino":
        config = with_accelerator(config, choice.precision)
    (target.stage / part.name / "config.pbtxt").write_text(config)
    files = sorted(folder.iterdir())
    source = PART_OF[part.name]
    report = ModelReport(
        model=part.name,
        parameters=sum(p.numel() for p in part.module.parameters()),
        macs=work.macs,
        pruning=pruning_of(checkpoint.folders[source]) if source in SOURCE.values() else None,
        loras=checkpoint.loras_of(source),
        lora_set=checkpoint.lora_set_of(source),
        bytes=sum(file.stat().st_size for file in files),
        sha256={file.name: sha256_of(file) for file in files},
        precision=target.precision.value,
        opset=OPSET,
        nodes_traced=nodes_traced,
        nodes=nodes,
        error=error,
        seconds=round(time.monotonic() - started, 2),
        checkpoint=checkpoint.name,
        revisions=checkpoint.revisions,
        tools={tool: importlib.metadata.version(tool) for tool in TOOLS},
        cpu_runtime=choice,
    )
    return (_with_plan(report, target) if target.profiles else report), work


def _with_plan(report: ModelReport, target: Build) -> ModelReport:
    folder = target.stage / report.model / "1"
    made_for = stage_plan(
        target.trt, folder / "model.onnx", target.repository, target.stage, target.profiles
    )
    hashes = report.sha256 | {PLAN: sha256_of(folder / PLAN)}
    return replace(report, sha256=hashes, plan=asdict(made_for))
