"""What plans were made for: a TensorRT, a GPU, and calls of the engine.

A plan runs only on the TensorRT version and the GPU that it was built with, and takes only the
rows and sizes that it was built for. Needs neither a GPU nor TensorRT to be imported.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinbrush.engine.capacity import Capacity, capacities
from twinbrush.engine.config import ENGINE, PipelineConfig, read_parameters, whole_numbers
from twinbrush.server.manifest import NAME, ManifestError, reading

CONFIG_NAME = "tensorrt"  # of the models' `configs/tensorrt.pbtxt`
PLAN = "model.plan"
REMEDY = "run `python3 -m export.tensorrt` in this container, on this GPU"


@dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        tensorrt: version, such as 10.14.1.48, or None where it is not installed.
        gpu: name and compute capability of the first GPU, or None where there is none.
    """

    tensorrt: str | None
    gpu: str | None


def this_machine() -> Target:
    return Target(library_version(ctypes.util.find_library("nvinfer")), gpu())


def library_version(library: str | None) -> str | None:
    """Version of a TensorRT library, by its file name or path; None where it is not there."""
    try:
        loaded = ctypes.CDLL(library) if library else None
    except OSError:
        return None
    if loaded is None:
        return None
    parts = ("Major", "Minor", "Patch", "Build")
    return ".".join(str(getattr(loaded, f"getInferLib{part}Version")()) for part in parts)


def gpu() -> str | None:
    """Name and compute capability of the first GPU, None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return listed.stdout.strip().partition("\n")[0] or None


@dataclass(frozen=True)
class Plan(Target):
    """What a manifest says of a plan; `calls` are those that it can take, by ascending side."""

    calls: tuple[Capacity, ...] = ()

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Plan:
        calls = tuple(Capacity(**call) for call in line.get("calls", ()))
        return cls(line["tensorrt"], line["gpu"], calls)


def engine_config(repository: Path) -> Path:
    """The engine's configuration that Triton takes beside plans."""
    own = repository / ENGINE.parent / "configs" / f"{CONFIG_NAME}.pbtxt"
    return own if own.is_file() else repository / ENGINE.parent / "config.pbtxt"


def engine_calls(config: Path, pipeline: PipelineConfig) -> tuple[Capacity, ...]:
    """What the engine calls networks with, by its configuration.

    Raises:
        ValueError: that file does not say it.
        OSError: it cannot be read.
    """
    (max_rows,) = whole_numbers(read_parameters(config), "max_rows", 1)
    return capacities(pipeline, max_rows)


def check_plans(repository: Path, machine: Target) -> None:
    """Holds the plans of a repository against the machine and the engine that are to run them.

    Raises:
        ManifestError: a model has no plan, which Triton would serve on ONNX Runtime, a plan was
            made for another TensorRT, GPU or for other calls, or a file cannot be read.
    """
    manifest = repository / NAME
    with reading(manifest):
        lines = json.loads(manifest.read_text())["models"] if manifest.is_file() else []
        without = [line["model"] for line in lines if not line.get("plan")]
        plans = {line["model"]: Plan.of(line["plan"]) for line in lines if line.get("plan")}
    if without or not plans:
        models = ", ".join(without) or "any model"
        raise ManifestError(f"{repository} has no TensorRT plan of {models}: {REMEDY}")
    try:
        pipeline = PipelineConfig.load(repository / ENGINE / "pipeline.json")
        calls = engine_calls(engine_config(repository), pipeline)
    except (ValueError, OSError) as error:
        raise ManifestError(str(error)) from error
    for model, plan in plans.items():
        for what, made, here in (
            ("TensorRT", plan.tensorrt, machine.tensorrt),
            ("GPU", plan.gpu, machine.gpu),
        ):
            if made != here:
                text = f"the plan of {model} was made for {what} {made}, this machine has"
                raise ManifestError(f"{text} {here or 'none'}: {REMEDY}")
        if plan.calls != calls:
            text = f"the plan of {model} takes {_describe(plan.calls)}, the engine asks for"
            raise ManifestError(f"{text} {_describe(calls)}, by max_rows: {REMEDY}")


def _describe(calls: Sequence[Capacity]) -> str:
    return ", ".join(f"{call.rows} rows to {call.side} pixels" for call in calls) or "nothing"
