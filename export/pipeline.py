"""What the engine needs besides the networks: `pipeline.json` and the two tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

from export.checkpoint import Checkpoint, CheckpointError
from export.part import Part
from export.tokenizer import load_tokenizer
from export.unet import side_multiple
from export.vqgan_decoder import latent_to_rgb, scale_factor

# The sampler that a checkpoint's scheduler class stands for, and defaults for its kind.
SAMPLER_OF = {
    "LCMScheduler": "lcm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
DISTILLED = {"steps": 4, "guidance_scale": 8.0}
UNDISTILLED = {"steps": 20, "guidance_scale": 7.5}


def write(checkpoint: Checkpoint, parts: dict[str, Part], folder: Path) -> None:
    """Writes `pipeline.json`, `clip_tokenizer.json` and `bert_tokenizer.json`.

    The checkpoint's `model_index.json` may hold `defaults` of requests (steps, guidance_scale,
    sampler) and `latent_to_rgb`, the map of previews; where it does not, they are chosen by
    the kind of checkpoint, and fitted on random latents.

    Raises:
        CheckpointError: the scheduler or a tokenizer is not one that can be served.
    """
    index = checkpoint.index
    unet = parts["unet"].module.unet
    scale = scale_factor(checkpoint)
    pipeline = {
        "checkpoint": checkpoint.name,
        "schedule": _schedule(checkpoint),
        "defaults": _defaults(checkpoint) | index.get("defaults", {}),
        "native_side": unet.config.sample_size * scale,
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


def _padding(checkpoint: Checkpoint, part: str, file: Path) -> int:
    """Writes a tokenizer; gives the id that its model is padded with."""
    tokenizer = load_tokenizer(checkpoint, part)
    tokenizer.backend_tokenizer.save(str(file))
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config("scheduler")
    name = checkpoint.classes["scheduler"]
    if name not in SAMPLER_OF:
        allowed = ", ".join(SAMPLER_OF)
        raise CheckpointError(f"scheduler is a {name}, which is not served: {allowed} are")
    # DDIM and LCM keep alpha_bar exact where others round a zero up.
    exact = diffusers.DDIMScheduler.from_config(config)
    return {
        "alphas_cumprod": exact.alphas_cumprod.double().tolist(),
        "prediction_type": exact.config.prediction_type,
        "timestep_spacing": config.get("timestep_spacing", "leading"),
        "steps_offset": config.get("steps_offset", 0),
        "set_alpha_to_one": config.get("set_alpha_to_one", True),
        "original_inference_steps": config.get("original_inference_steps", 50),
    }


def _defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """What suits checkpoints of this kind."""
    distilled = checkpoint.config("unet").get("time_cond_proj_dim")
    sampler = SAMPLER_OF[checkpoint.classes["scheduler"]]
    return {"sampler": sampler, **(DISTILLED if distilled else UNDISTILLED)}
