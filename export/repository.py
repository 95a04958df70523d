"""Building a model repository beside the one that serves, and putting it in its place.

Nothing of the old repository is touched before everything new is built and compared, so an
export that fails at any point leaves it as it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export import bert, clip_text, fusion, pipeline, unet, vqgan_decoder
from export.checkpoint import Checkpoint, CheckpointError
from export.convert import OPSET, parity_error, to_onnx
from export.macs import count_macs
from export.part import Part
from export.shapes import Pruning, pruning_of
from export.triton_config import with_tensors

ENGINE = Path("text_to_image_stream/1")  # where pipeline.json and the tokenizers live
MODELS = ("clip_text", "bert", "fusion", "unet", "vqgan_decoder")
# The part of a checkpoint that holds each model that can be pruned.
SOURCE = {
    "clip_text": "text_encoder",
    "bert": "text_encoder_2",
    "unet": "unet",
    "vqgan_decoder": "vae",
}
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ModelReport:
    """One line of the manifest.

    Attributes:
        parameters: how many the network has.
        macs: multiply-accumulates of one row at the size that it was trained on.
        pruning: what was removed from it, None where nothing was.
        bytes: of the ONNX file and its external data.
        sha256: of each file, by name.
        error: against PyTorch, as a share of the largest output.
        seconds: that its export took.
    """

    model: str
    parameters: int
    macs: int
    pruning: Pruning | None
    bytes: int
    sha256: dict[str, str]
    precision: str
    opset: int
    error: float
    seconds: float


def load_parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """All served models of a checkpoint, each held against those it is fed by."""
    clip, bert_part = clip_text.part(checkpoint), bert.part(checkpoint)
    fused = fusion.part(checkpoint, clip, bert_part)
    painter = unet.part(checkpoint, fused)
    decoder = vqgan_decoder.part(checkpoint, painter.output[1].axes[0])
    return {part.name: part for part in (clip, bert_part, fused, painter, decoder)}


def build(
    checkpoint: Checkpoint,
    repository: Path,
    progress: Callable[[str], None] = lambda model: None,
    only: Sequence[str] = MODELS,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> list[ModelReport]:
    """Exports a checkpoint into a repository that has its folders and `config.pbtxt` files.

    With `only`, the other models stay as an earlier export left them. `check` sees what was
    built before it takes its place; what it raises stops the export, what it says goes into
    the manifest. Gives the reports of the models that were built.

    Raises:
        CheckpointError: the checkpoint cannot be exported, or does not fit the models that stay.
        ParityError: a model does not say what its original says.
        OSError: the disk is full, or the repository cannot be written.
    """
    parts = load_parts(checkpoint)
    kept = _kept(parts, repository, only)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=repository.parent) as scratch:
        stage = Path(scratch)
        reports = []
        for name in only:
            progress(name)
            pruning = pruning_of(checkpoint.folders[SOURCE[name]]) if name in SOURCE else None
            reports.append(_build_model(parts[name], pruning, repository, stage))
        (stage / ENGINE).mkdir(parents=True)
        pipeline.write(checkpoint, parts, stage / ENGINE)
        built = {report.model: asdict(report) for report in reports}
        manifest = {
            "checkpoint": checkpoint.name,
            "revisions": checkpoint.revisions,
            "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
            "models": [(kept | built)[name] for name in MODELS],
            "gate": check(stage) if check else None,
        }
        (stage / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _put_in_place(stage, repository)
    return reports


def _kept(parts: dict[str, Part], repository: Path, only: Sequence[str]) -> dict[str, dict]:
    """Manifest lines of the models that stay."""
    stay = [name for name in MODELS if name not in only]
    if not stay:
        return {}
    try:
        lines = json.loads((repository / "MANIFEST.json").read_text())["models"]
    except FileNotFoundError:
        text = f"{repository} has no export of {', '.join(stay)} to keep: export everything"
        raise CheckpointError(text) from None
    for name in stay:
        config = (repository / name / "config.pbtxt").read_text()
        if with_tensors(config, parts[name]) != config:
            text = f"the {name} in {repository} has other tensors than this checkpoint's"
            raise CheckpointError(f"{text}: export everything")
    return {line["model"]: line for line in lines if line["model"] in stay}


def _build_model(part: Part, pruning: Pruning | None, repository: Path, stage: Path) -> ModelReport:
    started = time.monotonic()
    folder = stage / part.name / "1"
    folder.mkdir(parents=True)
    to_onnx(part, folder / "model.onnx")
    error = parity_error(part, folder / "model.onnx")
    config = repository / part.name / "config.pbtxt"
    (stage / part.name / "config.pbtxt").write_text(with_tensors(config.read_text(), part))
    files = sorted(folder.iterdir())
    return ModelReport(
        model=part.name,
        parameters=sum(p.numel() for p in part.module.parameters()),
        macs=count_macs(part),
        pruning=pruning,
        bytes=sum(file.stat().st_size for file in files),
        sha256={file.name: _sha256(file) for file in files},
        precision="fp32",
        opset=OPSET,
        error=error,
        seconds=round(time.monotonic() - started, 2),
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_in_place(stage: Path, repository: Path) -> None:
    """Renames every staged file to its place, the manifest last; renames need no space."""
    staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    for file in sorted(staged, key=lambda path: path.name == "MANIFEST.json"):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, repository / file)
    for data in repository.glob("*/1/model.onnx.data"):  # of a larger model before
        if data.relative_to(repository) not in staged:
            data.unlink()
