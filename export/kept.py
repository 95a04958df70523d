"""Models that an export leaves as an earlier one wrote them, held against those that it writes."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from export import pipeline
from export.checkpoint import Checkpoint
from export.part import Part
from export.triton_config import with_tensors
from networks.loading import CheckpointError
from twinbrush.engine.config import ENGINE
from twinbrush.server.manifest import NAME as MANIFEST


class RepositoryError(RuntimeError):
    """A repository cannot be exported into; the message names the file."""


def kept_lines(parts: dict[str, Part], repository: Path, only: Sequence[str]) -> dict[str, dict]:
    """Manifest lines of the models that stay."""
    stay = [name for name in parts if name not in only]
    if not stay:
        return {}
    manifest = repository / MANIFEST
    try:
        lines = json.loads(manifest.read_text())["models"] if manifest.is_file() else []
        exported = {line["model"]: line for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{manifest} cannot be read: {error!r}: export everything"
        raise RepositoryError(text) from error
    if missing := [name for name in stay if name not in exported]:
        text = f"{repository} has no export of {', '.join(missing)} to keep: export everything"
        raise CheckpointError(text)
    for name in stay:
        config = configuration(repository, name)
        if with_tensors(config, parts[name]) != config:
            text = f"the {name} in {repository} has other tensors than this checkpoint's"
            raise CheckpointError(f"{text}: export everything")
    return {name: exported[name] for name in stay}


def configuration(repository: Path, model: str) -> str:
    """A model's `config.pbtxt`; a text encoder without one has the settings of `clip_text`."""
    own = repository / model / "config.pbtxt"
    if own.is_file():
        return own.read_text()
    settings = (repository / "clip_text" / "config.pbtxt").read_text()
    return settings.replace('name: "clip_text"', f'name: "{model}"')


def check_tokenizers(kept: Container[str], repository: Path, stage: Path) -> None:
    """Refuses to give a text model that stays the token ids of another vocabulary."""
    for model, name in pipeline.TOKENIZER.items():
        if model not in kept:
            continue
        before = repository / ENGINE / name
        same = before.is_file() and before.read_bytes() == (stage / ENGINE / name).read_bytes()
        if not same:
            text = f"the {model} in {repository} has another {name} than this checkpoint's"
            raise CheckpointError(f"{text}: export everything")


def check_loras(
    kept: dict[str, dict], repository: Path, checkpoint: Checkpoint, part_of: Mapping[str, str]
) -> None:
    """Refuses to keep a model without a LoRA that changes it, or with others to switch on."""
    for name, line in kept.items():
        if line.get("lora_set", []) != checkpoint.lora_set_of(part_of[name]):
            text = f"the {name} in {repository} has another --lora-set, and --only leaves it out"
            raise CheckpointError(f"{text}: export everything")
        fused = {(record["sha256"], record["scale"]) for record in line.get("loras", [])}
        for lora in checkpoint.serving.loras:
            if part_of[name] in lora.parts and (lora.sha256, lora.scale) not in fused:
                text = f"--lora {lora.file} changes {name}, which --only leaves out"
                raise CheckpointError(f"{text}: {repository} has it without the LoRA")
