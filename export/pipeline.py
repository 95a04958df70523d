"""What the engine needs besides the networks: `pipeline.json` and the two tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.part import Part
from export.scheduler import check_defaults, choose_sampler, family_defaults, read_schedule
from export.tokenizer import load_tokenizer
from export.unet import side_multiple
from export.vqgan_decoder import latent_to_rgb, scale_factor
from networks.loading import CheckpointError
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.request import GenerationRequest


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
    pipeline = {
        "checkpoint": checkpoint.name,
        "schedule": _schedule(checkpoint),
        "defaults": defaults(checkpoint),
        "native_side": native_side(checkpoint),
        "side_multiple": side_multiple(unet) * scale,
        "scale_factor": scale,
        "latent_channels": unet.config.in_channels,
        "clip_tokens": parts["clip_text"].inputs["input_ids"].axes[0],
        "bert_tokens": parts["bert"].inputs["input_ids"].axes[0],
        "clip_pad": _padding(checkpoint, "tokenizer", folder / "clip_tokenizer.json"),
        "bert_pad": _padding(checkpoint, "tokenizer_2", folder / "bert_tokenizer.json"),
        "timestep_cond": unet.config.time_cond_proj_dim,
        "latent_to_rgb": index.get("latent_to_rgb") or latent_to_rgb(parts["vqgan_decoder"]),
    }
    (folder / "pipeline.json").write_text(json.dumps(pipeline) + "\n")
    _check(checkpoint, folder)


def _check(checkpoint: Checkpoint, folder: Path) -> None:
    """Reads the files as the engine does, and a request that is silent."""
    try:
        config = PipelineConfig.load(folder / "pipeline.json")
        PromptTokenizer(folder, config)
        GenerationRequest.parse({"prompt": np.array(["a"], object)}, config)
    except ValueError as error:
        text = str(error).replace(f"{folder}/", "")
        raise CheckpointError(f"{checkpoint.name} cannot be served: {text}") from error


def native_side(checkpoint: Checkpoint) -> int:
    """Side of the pictures that the UNet learnt, in pixels."""
    return checkpoint.config("unet")["sample_size"] * scale_factor(checkpoint)


def _padding(checkpoint: Checkpoint, part: str, file: Path) -> int:
    """Writes a tokenizer; gives the id that its model is padded with."""
    tokenizer = load_tokenizer(checkpoint, part)
    tokenizer.backend_tokenizer.save(str(file))
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_schedule(checkpoint.classes["scheduler"], checkpoint.config("scheduler"))


def defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Defaults of requests: the checkpoint's, or those of its family."""
    sampler = choose_sampler(checkpoint.classes["scheduler"], checkpoint.config("scheduler"))
    timestep_cond = bool(checkpoint.config("unet").get("time_cond_proj_dim"))
    usual, _ = family_defaults(sampler, checkpoint.name, timestep_cond)
    return usual | check_defaults(checkpoint.index.get("defaults", {}))
