"""What the engine needs besides the networks: `pipeline.json` and the two tokenizers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.part import Part
from export.scheduler import (
    PIPELINE_OPTIONS,
    check_clipping,
    check_defaults,
    choose_sampler,
    family_defaults,
    read_schedule,
    unused_options,
)
from export.sizes import native_size, scale_factor, side_multiple
from export.tokenizer import check_ids, check_vocabulary, load_tokenizer
from export.unet import MAX_CHUNKS
from export.vqgan_decoder import latent_to_rgb
from networks.loading import CheckpointError, first_line, refusing
from twinbrush.engine.config import LORA_SCALE, PipelineConfig
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.request import FIELDS, GenerationRequest

# File of the tokenizer whose ids each text model was trained on.
TOKENIZER = {
    "clip_text": "clip_tokenizer.json",
    "clip_text_2": "clip_tokenizer_2.json",
    "bert": "bert_tokenizer.json",
}
PIPELINE = "pipeline.json"
PART_OF_TOKENIZER = {
    "tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "bert_tokenizer": "bert",
}  # fmt: skip
SOURCES = {"clip_text": "tokenizer", "clip_text_2": "tokenizer_2", "bert": "bert_tokenizer"}


def write(checkpoint: Checkpoint, parts: dict[str, Part], folder: Path) -> None:
    """Writes `pipeline.json`, `clip_tokenizer.json` and `bert_tokenizer.json`.

    The checkpoint's `model_index.json` may hold `defaults` of requests (steps, guidance_scale,
    sampler) and `latent_to_rgb`, the map of previews; where it does not, they are chosen by
    the kind of checkpoint, and fitted on random latents.

    Raises:
        CheckpointError: the scheduler, a default or a tokenizer is not one that can be served.
    """
    index = checkpoint.index
    unet = parts["unet"].module.unet
    scale = scale_factor(checkpoint)
    height, width = native_size(checkpoint)
    pipeline = {
        "checkpoint": checkpoint.name,
        "checkpoint_hash": checkpoint.weights_hash(),
        "schedule": _schedule(checkpoint),
        "defaults": defaults(checkpoint),
        "native_width": width * scale,
        "native_height": height * scale,
        "side_multiple": side_multiple(unet.config) * scale,
        "scale_factor": scale,
        "latent_channels": unet.config.in_channels,
        "encoders": [
            _encoder(checkpoint, parts[model], tokenizer, folder)
            for model, tokenizer in SOURCES.items()
            if model in parts
        ],
        "fusion_inputs": list(parts["fusion"].inputs),
        "unet_inputs": [n for n in parts["unet"].inputs if n not in ("sample", "timestep")],
        "timestep_cond": unet.config.time_cond_proj_dim,
        "max_chunks": MAX_CHUNKS,
        "loras": list(checkpoint.serving.lora_set),
        "zeros_for_empty_negative": _zeros_for_empty_negative(checkpoint),
        "latent_to_rgb": index.get("latent_to_rgb") or latent_to_rgb(parts["vqgan_decoder"]),
    }
    (folder / PIPELINE).write_text(json.dumps(pipeline) + "\n")
    _check(checkpoint, folder)


def add_memory(folder: Path, memory: dict[str, Any] | None) -> None:
    """Adds to `pipeline.json` what calls take of memory, see `engine.memory.NetworkMemory`."""
    file = folder / PIPELINE
    fields = json.loads(file.read_text()) | {"memory": memory}
    file.write_text(json.dumps(fields) + "\n")


def memory_of(folder: Path) -> dict[str, Any]:
    """What an earlier export has measured; nothing where there was none, or it cannot be read."""
    try:
        return json.loads((folder / PIPELINE).read_text()).get("memory") or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _zeros_for_empty_negative(checkpoint: Checkpoint) -> bool:
    """Whether an empty negative prompt stands for zeros; SDXL's pipeline defaults to it."""
    two_towers = "text_encoder_2" in checkpoint.folders
    return two_towers and bool(checkpoint.index.get("force_zeros_for_empty_prompt", True))


def _check(checkpoint: Checkpoint, folder: Path) -> None:
    """Reads the files as the engine does, and a request that is silent."""
    try:
        PromptTokenizer(folder, _parse_silent_request(folder / PIPELINE))
    except ValueError as error:
        text = str(error).replace(f"{folder}/", "")
        raise CheckpointError(f"{checkpoint.name} cannot be served: {text}") from error


def _parse_silent_request(file: Path) -> PipelineConfig:
    """Reads `pipeline.json` as the engine does, and a request that has a prompt only.

    Raises:
        ValueError: the file is not of its form, or a default is not what a request may have.
    """
    config = PipelineConfig.load(file)
    for name, value in asdict(config.defaults).items():
        FIELDS[name].rule.check(name, value, config)
    GenerationRequest.parse({"prompt": np.array(["a"], object)}, config)
    return config


def native_side(checkpoint: Checkpoint) -> int:
    """Longer side of the pictures that the UNet was trained on, in pixels."""
    return max(native_size(checkpoint)) * scale_factor(checkpoint)


def check(checkpoint: Checkpoint) -> None:
    """Checks the scheduler, the defaults and the native size, without loading a part.

    Raises:
        CheckpointError: one of them cannot be served.
    """
    schedule = _schedule(checkpoint)
    scale = scale_factor(checkpoint)
    height, width = native_size(checkpoint)
    fields = {
        "checkpoint": checkpoint.name,
        "schedule": schedule,
        "defaults": defaults(checkpoint),
        "native_width": width * scale,
        "native_height": height * scale,
        "side_multiple": scale * side_multiple(checkpoint.config("unet")),
        "scale_factor": scale,
        "latent_channels": checkpoint.config("unet").get("in_channels", 4),
        "encoders": [],
        "fusion_inputs": [],
        "unet_inputs": [],
        "timestep_cond": checkpoint.config("unet").get("time_cond_proj_dim"),
        "latent_to_rgb": [],
    }
    try:
        _check_preview(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pipeline.json")
            file.write_text(json.dumps(fields))
            _parse_silent_request(file)
    except (ValueError, TypeError) as error:
        text = first_line(error)
        raise CheckpointError(f"{checkpoint.name} cannot be served: {text}") from error


def _check_preview(checkpoint: Checkpoint) -> None:
    table = checkpoint.index.get("latent_to_rgb")
    if table is None:
        return
    rows = 9 * checkpoint.config("unet").get("in_channels", 4) + 1
    try:
        numbers = np.array(table, float)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (rows, 3) or not np.isfinite(numbers).all():
        raise ValueError(f"latent_to_rgb in model_index.json must be {rows} rows of 3 numbers")


def _encoder(checkpoint: Checkpoint, part: Part, source: str, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer of a text encoder; returns its entry in `pipeline.json`."""
    tokenizer = load_tokenizer(checkpoint, source)
    file, place = TOKENIZER[part.name], checkpoint.folders[source]
    check_vocabulary(checkpoint, tokenizer, source, PART_OF_TOKENIZER[source])
    with refusing(place):
        tokenizer.backend_tokenizer.save(str(folder / file))
        check_ids(tokenizer, place, folder / file)
    pad = tokenizer.pad_token_id
    if source == "tokenizer_2" and checkpoint.folders[source] == checkpoint.folders["tokenizer"]:
        pad = 0  # OpenCLIP's towers pad with "!"; a single file has one vocabulary for both
    return {
        "model": part.name,
        "tokenizer": file,
        "length": part.inputs["input_ids"].axes[0],
        "pad": pad if pad is not None else tokenizer.eos_token_id or 0,
        "mask": "attention_mask" in part.inputs,
        "takes_loras": LORA_SCALE in part.inputs,
    }


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    pipeline = checkpoint.index.get("_class_name")
    config = checkpoint.config("scheduler") | PIPELINE_OPTIONS.get(pipeline, {})
    class_name, replacement = checkpoint.classes["scheduler"], checkpoint.serving.sampler
    schedule = read_schedule(class_name, config, replacement)
    if replacement is None and pipeline is not None:
        check_clipping(class_name, config)
    return schedule


def defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Defaults of requests: of the command, else of the checkpoint, else of its family."""
    return _usual(checkpoint)[0] | _given(checkpoint)


def guessed_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The defaults that nothing says: neither command, nor checkpoint, nor its family."""
    usual, guessed = _usual(checkpoint)
    known = {"sampler", *_given(checkpoint)}
    return {name: value for name, value in usual.items() if guessed and name not in known}


def unused_scheduler_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint's scheduler says and the sampler in its place does not use."""
    class_name, config = checkpoint.classes["scheduler"], checkpoint.config("scheduler")
    sampler = checkpoint.serving.sampler
    return unused_options(class_name, config, sampler) if sampler else {}


def _given(checkpoint: Checkpoint) -> dict[str, Any]:
    """Defaults that the checkpoint or the command says."""
    serving = checkpoint.serving
    replaced = {"sampler": serving.sampler} if serving.sampler else {}
    try:
        given = check_defaults(checkpoint.index.get("defaults", {}))
    except CheckpointError as error:
        raise CheckpointError(f"model_index.json: {error}") from error
    return given | replaced | check_defaults(serving.defaults)


def _usual(checkpoint: Checkpoint) -> tuple[dict[str, Any], bool]:
    class_name, config = checkpoint.classes["scheduler"], checkpoint.config("scheduler")
    sampler = choose_sampler(class_name, config, checkpoint.serving.sampler)
    timestep_cond = bool(checkpoint.config("unet").get("time_cond_proj_dim"))
    return family_defaults(sampler, checkpoint.name, timestep_cond)
