"""Unpacks a single `.safetensors` checkpoint, as on Civitai, into a folder in diffusers layout.

The shapes of the tensors give the configurations, so no network and no configuration file is
needed; diffusers' own functions rename the tensors. What shapes cannot tell (heads, noise
schedule, scaling of latents) is that of the published family: Stable Diffusion 1.x, 2.x or XL.
A single file holds no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.weights import read_header
from networks.loading import CheckpointError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
HEAD_WIDTH = 64  # of CLIP's text towers, and of the UNets of 2.x and XL
BASE_SIDE = 64  # of the latents of the base of 2.x
UNET_HEADS = 8  # of the UNets of 1.x
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False, "timestep_spacing": "leading",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What the shapes of a checkpoint cannot tell.

    Attributes:
        pipeline, scheduler: names of diffusers' classes.
        clip: prefix of the first text encoder.
        open_clip: whether that is OpenCLIP's.
        side: of the latents that the UNet was trained on.
        scaling_factor: of latents.
    """

    pipeline: str
    scheduler: str
    clip: str
    open_clip: bool
    side: int
    scaling_factor: float


FAMILIES = (
    Family("StableDiffusionPipeline", "DDIMScheduler", "cond_stage_model.transformer.", False, 64,
           0.18215),
    Family("StableDiffusionPipeline", "DDIMScheduler", "cond_stage_model.model.", True, 96,
           0.18215),
    Family("StableDiffusionXLPipeline", "EulerDiscreteScheduler",
           "conditioner.embedders.0.transformer.", False, 128, 0.13025),
)  # fmt: skip
REFINER = "conditioner.embedders.0.model."  # its only text encoder, which is the base's second
XL_SECOND = "conditioner.embedders.1.model."
# Beginnings of names of what is beside a UNet in files of other pipelines.
OTHERS = {
    "edm_": "is of a UNet that was trained on the noise of EDM (Playground 2.5, CosXL)",
    "control_model.": "holds a ControlNet",
}
END = 49407  # the id of CLIP's end mark, its last


def unpack(
    file: Path,
    folder: Path,
    pipelines: Sequence[str],
    without: Container[str] = (),
    prediction: str | None = None,
) -> list[str]:
    """Writes the parts of `file` into `folder`; tensors keep their precision.

    Args:
        file: the checkpoint.
        folder: gets the parts.
        pipelines: classes that are served; files of others are rejected before they are read.
        without: names of parts that are not wanted, and need not be in the file.
        prediction: what the UNet predicts; None reads it, or guesses as diffusers does.

    Returns:
        Sentences about what was guessed.

    Raises:
        CheckpointError: it is cut short, a pointer, or no checkpoint of a family that is read.
    """
    header = read_header(file)
    family = _family(file, header, without)
    if family.pipeline not in pipelines:
        text = f"{file} is a checkpoint of {family.pipeline}, which is not served"
        raise CheckpointError(f"{text}: {', '.join(pipelines)} are")
    shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in shapes}
            metadata = stored.metadata() or {}
        guesses = []
        if prediction is None:
            prediction, guessed = _prediction(tensors, family, metadata)
            guesses = [f"{prediction}; set it with --prediction-type"] if guessed else []
        if family.open_clip and prediction == "epsilon":
            family = replace(family, side=BASE_SIDE)
        parts = {"unet": _unet(tensors, family), **_text_encoders(tensors, family)}
        if "vae" not in without:
            parts["vae"] = _vae(tensors, family)
    except CheckpointError:
        raise
    except KeyError as error:
        text = f"{file} lacks {error.args[0]}, or is of no known layout: download it again"
        raise CheckpointError(text) from error
    except (SafetensorError, IndexError, AttributeError, ValueError) as error:
        text = f"{file} is not a Stable Diffusion checkpoint of a known layout: {error!r}"
        raise CheckpointError(text) from error
    index: dict[str, Any] = {"_class_name": family.pipeline}
    for name, (library, class_name, config, weights) in parts.items():
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(contiguous, place / f"{stem}.safetensors", {"format": "pt"})
        index[name] = [library, class_name]
    schedule = SCHEDULE | {"prediction_type": prediction}
    if "ztsnr" in tensors:
        schedule["rescale_betas_zero_snr"] = True
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2))
    index["scheduler"] = ["diffusers", family.scheduler]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return guesses


def _family(file: Path, header: Mapping[str, Any], without: Container[str]) -> Family:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in header)

    if not has(UNET):
        kind = "a LoRA" if any("lora" in name for name in header) else "no whole checkpoint"
        text = f"{file} is {kind}: it has no tensor that begins with {UNET}"
        raise CheckpointError(f"{text}; give a file with UNet, text encoder and VAE")
    if has(REFINER):
        text = f"{file} is SDXL's refiner, which paints over pictures and is not served"
        raise CheckpointError(f"{text}; give the base checkpoint")
    for prefix, kind in OTHERS.items():
        if has(prefix):
            raise CheckpointError(f"{file} {kind}, which is not served")
    first = header.get(f"{UNET}input_blocks.0.0.weight", {}).get("shape", [0, 4])
    last = header.get(f"{UNET}out.2.weight", {}).get("shape", [first[1]])
    if first[1] != last[0]:
        text = f"{file} has a UNet with {first[1]} channels in and {last[0]} out"
        raise CheckpointError(f"{text}: only UNets that paint from noise alone are served")
    for family in FAMILIES:
        if has(family.clip):
            break
    else:
        known = ", ".join(family.clip for family in FAMILIES)
        text = f"{file} has no text encoder that is read: no tensor begins with {known}"
        raise CheckpointError(f"{text}; give the checkpoint in diffusers layout")
    if not has(VAE) and "vae" not in without:
        text = f"{file} has no VAE: no tensor begins with {VAE}"
        raise CheckpointError(f"{text}; --vae names an autoencoder to take")
    return family


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """How many numbers stand at the group of `pattern` in names."""
    expression = re.compile(pattern)
    return len({match[1] for name in names if (match := expression.match(name))})


Part = tuple[str, str, dict[str, Any], dict[str, Tensor]]  # library, class, config, weights


def _unet(tensors: Mapping[str, Tensor], family: Family) -> Part:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {k.removeprefix(UNET): v for k, v in tensors.items() if k.startswith(UNET)}
    levels: list[list[int]] = [[]]  # input blocks of each level
    for block in range(1, _count(own, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in own:
            levels.append([])
        else:
            levels[-1].append(block)
    widths = [len(own[f"input_blocks.{level[0]}.0.out_layers.3.weight"]) for level in levels]
    layers = len(levels[0])
    down = [[_depth(own, f"input_blocks.{block}") for block in level] for level in levels]
    outputs = [_depth(own, f"output_blocks.{i}") for i in range((layers + 1) * len(levels))]
    up = [outputs[i : i + layers + 1] for i in range(0, len(outputs), layers + 1)]
    end = ".1.transformer_blocks.0.attn2.to_k.weight"
    inner = next((name for name in own if name.endswith(end)), f"middle_block{end}")
    linear = own[inner.partition(".transformer_blocks.")[0] + ".proj_in.weight"].ndim == 2
    label = own.get("label_emb.0.0.weight")
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": family.side,
        "in_channels": own["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(own["out.2.weight"]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in up],
        "cross_attention_dim": own[inner].shape[1],
        "attention_head_dim": [w // HEAD_WIDTH or 1 for w in widths] if linear else UNET_HEADS,
        "use_linear_projection": linear,
        **_depths(down, up, _middle(own)),
    }
    if (guidance := own.get("time_embed.cond_proj.weight")) is not None:
        config["time_cond_proj_dim"] = guidance.shape[1]
    if label is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": label.shape[1],
        }
    weights = convert_ldm_unet_checkpoint(dict(tensors), config)
    return "diffusers", "UNet2DConditionModel", config, weights


def _depth(own: Mapping[str, Tensor], block: str) -> int:
    """Transformer layers in a block; 0 where it has no attention."""
    return _count(own, rf"{block}\.1\.transformer_blocks\.(\d+)\.")


def _middle(own: Mapping[str, Tensor]) -> int | None:
    """Transformer layers in the middle; None where there is no middle."""
    there = any(name.startswith("middle_block.") for name in own)
    return _depth(own, "middle_block") if there else None


def _depths(down: list[list[int]], up: list[list[int]], middle: int | None) -> dict[str, Any]:
    """Settings for the depths of transformers; distilled UNets lack some, or the middle."""
    levels = [*down[:-1], [depth or middle or 1 for depth in down[-1]]]  # as the middle's
    pairs = zip(down, reversed(up), strict=True)
    if all(len({*inward, *outward}) == 1 for inward, outward in pairs):
        depths = {"transformer_layers_per_block": [level[0] or 1 for level in levels]}
    else:
        depths = {
            "transformer_layers_per_block": [[d or 1 for d in level] for level in levels],
            "reverse_transformer_layers_per_block": [[d or 1 for d in level] for level in up],
        }
    if middle is None:
        depths["mid_block_type"] = None
    elif middle == 0:
        depths["mid_block_type"] = "UNetMidBlock2D"
    return depths


def _vae(tensors: Mapping[str, Tensor], family: Family) -> Part:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own = {k.removeprefix(VAE): v for k, v in tensors.items() if k.startswith(VAE)}
    levels = _count(own, r"decoder\.up\.(\d+)\.")
    widths = [len(own[f"decoder.up.{i}.block.0.conv1.weight"]) for i in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "sample_size": family.side * 2 ** (levels - 1),
        "in_channels": 3,
        "out_channels": len(own["decoder.conv_out.weight"]),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(own, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        "latent_channels": len(own["post_quant_conv.weight"]),
        "scaling_factor": family.scaling_factor,
    }
    weights = convert_ldm_vae_checkpoint(dict(tensors), config)
    return "diffusers", "AutoencoderKL", config, weights


def _text_encoders(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Part]:
    first = _clip(tensors, family.clip, family.open_clip, "CLIPTextModel")
    if family.pipeline != "StableDiffusionXLPipeline":
        return {"text_encoder": first}
    second = _clip(tensors, XL_SECOND, True, "CLIPTextModelWithProjection")
    return {"text_encoder": first, "text_encoder_2": second}


def _clip(tensors: Mapping[str, Tensor], prefix: str, open_clip: bool, class_name: str) -> Part:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    if open_clip:
        width = own[f"{prefix}positional_embedding"].shape[1]
        weights = convert_open_clip_checkpoint(_Tower(width), own, prefix)
    else:
        weights = {k.removeprefix(prefix): v for k, v in own.items()}
    start = "text_model."  # older files are without it
    weights = {
        k if k.startswith((start, "text_projection.")) else start + k: v
        for k, v in weights.items()
        if not k.endswith("position_ids")
    }
    positions = weights["text_model.embeddings.position_embedding.weight"]
    layer = "text_model.encoder.layers.0.mlp.fc1.weight"
    config = {
        "architectures": [class_name],
        "model_type": "clip_text_model",
        "hidden_size": positions.shape[1],
        "max_position_embeddings": len(positions),
        "vocab_size": len(weights["text_model.embeddings.token_embedding.weight"]),
        "intermediate_size": len(weights[layer]),
        "num_hidden_layers": _count(weights, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": positions.shape[1] // HEAD_WIDTH or 1,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
    }
    config["eos_token_id"] = min(END, config["vocab_size"] - 1)
    if class_name == "CLIPTextModelWithProjection":
        config["projection_dim"] = len(weights["text_projection.weight"])
    else:
        weights.pop("text_projection.weight", None)
    return "transformers", class_name, config, weights


class _Tower:
    """The part of a text model that diffusers' conversion looks at."""

    def __init__(self, width: int):
        self.config = type("Config", (), {"hidden_size": width})


def _prediction(
    tensors: Mapping[str, Tensor], family: Family, metadata: Mapping[str, str]
) -> tuple[str, bool]:
    """What the UNet predicts, as the file says, else as its family does; and if it is a guess."""
    written = metadata.get("modelspec.prediction_type", "")
    if written.startswith("v") or "v_pred" in tensors:
        return "v_prediction", False
    if written.startswith("eps") or not family.open_clip:
        return "epsilon", False
    # The base of 2.x was saved at this step; diffusers tells it apart by the same.
    base = int(tensors.get("global_step", 0)) == 875000
    return "epsilon" if base else "v_prediction", not base
