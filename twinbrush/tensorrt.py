"""Which TensorRT and which GPU this machine has, and whether plans were made for them.

A plan runs only on the TensorRT version and the GPU that it was built with. Needs neither a GPU
nor TensorRT to be imported.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from twinbrush.manifest import NAME, ManifestError, reading

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


def check_plans(repository: Path, machine: Target) -> None:
    """Holds the plans of a repository against the machine that is to run them.

    Raises:
        ManifestError: a model has no plan, which Triton would serve on ONNX Runtime, a plan was
            made for another TensorRT or GPU, or the manifest cannot be read.
    """
    manifest = repository / NAME
    with reading(manifest):
        lines = json.loads(manifest.read_text())["models"] if manifest.is_file() else []
        without = [line["model"] for line in lines if not line.get("plan")]
        plans = {line["model"]: Target(**line["plan"]) for line in lines if line.get("plan")}
    if without or not plans:
        models = ", ".join(without) or "any model"
        raise ManifestError(f"{repository} has no TensorRT plan of {models}: {REMEDY}")
    for model, made_for in plans.items():
        for what, made, here in (
            ("TensorRT", made_for.tensorrt, machine.tensorrt),
            ("GPU", made_for.gpu, machine.gpu),
        ):
            if made != here:
                text = f"the plan of {model} was made for {what} {made}, this machine has"
                raise ManifestError(f"{text} {here or 'none'}: {REMEDY}")
