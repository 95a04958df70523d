"""What the engine needs besides the networks: `pipeline.json` and the two tokenizers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

from export.checkpoint import Checkpoint
from export.part import Part
from export.tokenizer import load_tokenizer
from export.unet import side_multiple
from export.vqgan_decoder import latent_to_rgb, scale_factor
from networks.loading import CheckpointError
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.request import GenerationRequest

# The sampler that a checkpoint's scheduler class stands for, and defaults for its kind.
SAMPLER_OF = {
    "LCMScheduler": "lcm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
# What the engine's samplers stand for, of options that a scheduler may set otherwise. Where
# clip_sample is left out it is off, whatever its class says, as in pipelines of diffusers.
OPTIONS = {
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_scaling": 10.0,
}
DISTILLED = {"steps": 4, "guidance_scale": 8.0}
FUSED = {"steps": 4, "guidance_scale": 1.0}  # an LCM-LoRA in a UNet that is told no guidance
UNDISTILLED = {"steps": 20, "guidance_scale": 7.5}


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
        "bert_pad": _padding(checkpoint, "bert_tokenizer", folder / "bert_tokenizer.json"),
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
    given = checkpoint.config("scheduler")
    name = checkpoint.classes["scheduler"]
    if name not in SAMPLER_OF:
        allowed = ", ".join(SAMPLER_OF)
        raise CheckpointError(f"scheduler is a {name}, which is not served: {allowed} are")
    scheduler_class = getattr(diffusers, name)
    known = inspect.signature(scheduler_class).parameters
    for option, served in OPTIONS.items():
        if option in known and given.get(option) not in (None, served):
            text = f"scheduler has {option} {given[option]!r}, which is not served"
            raise CheckpointError(f"{text}: {served!r} is")
    try:
        config = scheduler_class.from_config(given).config
        # DDIM and LCM keep alpha_bar exact where others round a zero up.
        exact = diffusers.DDIMScheduler(
            **{beta: config[beta] for beta in BETAS},
            rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        )
    except Exception as error:
        raise CheckpointError(f"scheduler is no {name} that can be read: {error}") from error
    return {
        "alphas_cumprod": exact.alphas_cumprod.double().tolist(),
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.get("set_alpha_to_one", True),
        "original_inference_steps": config.get("original_inference_steps", 50),
    }


def defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of requests: what the checkpoint says, and where it does not, what suits its kind."""
    sampler = SAMPLER_OF.get(checkpoint.classes["scheduler"])
    if checkpoint.config("unet").get("time_cond_proj_dim"):
        usual = DISTILLED
    else:
        usual = FUSED if sampler == "lcm" else UNDISTILLED
    return {"sampler": sampler, **usual, **checkpoint.index.get("defaults", {})}
