"""Tiny checkpoints with the structure of published ones: classes, blocks, scheduler, tokenizers.

Each family names repositories whose JSON files it follows; widths, depths and vocabularies are
reduced, the weights are random. Parts of equal settings are made once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from checkpoints import TOKENS, trained_tokenizer

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD_BLOCKS = {
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "block_out_channels": (16, 32),
}
# BK-SDM leaves out the middle; the tiny one the innermost stage too.
BK_SMALL = {**SD_BLOCKS, "mid_block_type": None}
BK_TINY = {
    "down_block_types": (CROSS_DOWN,) * 2,
    "up_block_types": (CROSS_UP,) * 2,
    "block_out_channels": (16, 32),
    "mid_block_type": None,
}
SD2_UNET = {"use_linear_projection": True, "attention_head_dim": (1, 2)}
XL_UNET = {
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "block_out_channels": (16, 32),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "cross_attention_dim": 32 + 40,
}
# Segmind's UNets differ from SDXL's in the depth of their transformers alone.
SSD_1B = {
    **XL_UNET,
    "transformer_layers_per_block": (0, 3),
    "reverse_transformer_layers_per_block": ((2, 1), 0),
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {
    **XL_UNET,
    "transformer_layers_per_block": (0, 2),
    "reverse_transformer_layers_per_block": ((1, 1), 0),
    "mid_block_type": "UNetMidBlock2D",
}

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PNDM = ("PNDMScheduler", BETAS | {"steps_offset": 1, "skip_prk_steps": True,
                                  "set_alpha_to_one": False, "clip_sample": False})  # fmt: skip
DDIM = ("DDIMScheduler", BETAS | {"steps_offset": 1, "set_alpha_to_one": False,
                                  "clip_sample": False})  # fmt: skip
DDIM_V = (DDIM[0], DDIM[1] | {"prediction_type": "v_prediction"})
PNDM_V = (PNDM[0], PNDM[1] | {"prediction_type": "v_prediction"})
EULER = ("EulerDiscreteScheduler", BETAS | {"steps_offset": 1, "timestep_spacing": "leading",
                                            "interpolation_type": "linear"})  # fmt: skip
TRAILING = (EULER[0], EULER[1] | {"timestep_spacing": "trailing"})
TURBO = ("EulerAncestralDiscreteScheduler", BETAS | {"steps_offset": 1,
                                                     "timestep_spacing": "trailing"})  # fmt: skip
LCM = ("LCMScheduler", BETAS | {"steps_offset": 1, "set_alpha_to_one": True,
                                "original_inference_steps": 50, "clip_sample": False})  # fmt: skip
DPM = ("DPMSolverMultistepScheduler", BETAS | {"steps_offset": 1, "algorithm_type": "dpmsolver++",
                                               "solver_order": 2})  # fmt: skip
EDM_DPM = (DPM[0], DPM[1] | {"use_karras_sigmas": True, "timestep_spacing": "leading"})


@dataclass(frozen=True)
class Family:
    """A published checkpoint in small.

    Attributes:
        unet: settings beside those that all share.
        scheduler: its class, and configuration.
        open_clip: whether the tower is OpenCLIP's, which pads with "!".
        xl: whether there are two towers.
        vq: whether the autoencoder looks codes up.
        steps, guidance_scale: to compare pictures at.
        index: more of `model_index.json`.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] = PNDM
    open_clip: bool = False
    xl: bool = False
    vq: bool = False
    steps: int = 4
    guidance_scale: float = 7.5
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def pipeline(self) -> str:
        if self.xl:
            return "StableDiffusionXLPipeline"
        lcm = "time_cond_proj_dim" in self.unet
        return "LatentConsistencyModelPipeline" if lcm else "StableDiffusionPipeline"


def _xl(unet: dict[str, Any] = XL_UNET, scheduler: tuple = EULER, **options: Any) -> Family:
    zeros = {"force_zeros_for_empty_prompt": True}
    return Family(unet, scheduler, xl=True, index=zeros, **options)


SD1 = Family(SD_BLOCKS)
DISTILLED = {"steps": 1, "guidance_scale": 0.0}
FAMILIES: dict[str, Family] = {
    "runwayml/stable-diffusion-v1-5": SD1,
    "CompVis/stable-diffusion-v1-4": SD1,
    "prompthero/openjourney": SD1,
    "hakurei/waifu-diffusion": Family(SD_BLOCKS, DDIM),
    "dreamlike-art/dreamlike-photoreal-2.0": Family(SD_BLOCKS, DDIM),
    "Lykon/dreamshaper-8": Family(SD_BLOCKS, DPM),
    "stabilityai/stable-diffusion-2-1-base": Family(SD_BLOCKS | SD2_UNET, PNDM, open_clip=True),
    "stabilityai/stable-diffusion-2-1": Family(
        SD_BLOCKS | SD2_UNET | {"upcast_attention": True}, DDIM_V, open_clip=True
    ),
    "stabilityai/stable-diffusion-2": Family(SD_BLOCKS | SD2_UNET, PNDM_V, open_clip=True),
    "stabilityai/sd-turbo": Family(SD_BLOCKS | SD2_UNET, TURBO, open_clip=True, **DISTILLED),
    "SimianLuo/LCM_Dreamshaper_v7": Family(SD_BLOCKS | {"time_cond_proj_dim": 16}, LCM),
    "nota-ai/bk-sdm-small": Family(BK_SMALL, PNDM),
    "nota-ai/bk-sdm-tiny": Family(BK_TINY, PNDM),
    "segmind/small-sd": Family(BK_SMALL, DPM),
    "segmind/tiny-sd": Family(BK_TINY, DPM),
    "stabilityai/stable-diffusion-xl-base-1.0": _xl(),
    "SG161222/RealVisXL_V4.0": _xl(),
    "playgroundai/playground-v2-1024px-aesthetic": _xl(scheduler=EDM_DPM, guidance_scale=3.0),
    "stabilityai/sdxl-turbo": _xl(scheduler=TURBO, **DISTILLED),
    "ByteDance/SDXL-Lightning": _xl(scheduler=TRAILING, guidance_scale=0.0),
    "latent-consistency/lcm-sdxl": _xl(
        XL_UNET | {"time_cond_proj_dim": 16}, LCM, guidance_scale=8.0
    ),
    "segmind/SSD-1B": _xl(SSD_1B, guidance_scale=9.0),
    "segmind/Segmind-Vega": _xl(VEGA, guidance_scale=9.0),
    "VQModel under SD1.4's UNet": Family(SD_BLOCKS, DDIM, vq=True),
}


def write_family(folder: Path, family: Family) -> Path:
    """Writes the checkpoint of a family; equal settings give equal weights."""
    index: dict[str, Any] = {"_class_name": family.pipeline, **family.index}
    torch.manual_seed(1)
    towers = _xl_towers() if family.xl else {"text_encoder": _tower(family.open_clip)}
    torch.manual_seed(2)
    vae = _vq() if family.vq else _kl(family.xl)
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(**{
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8, **family.unet,
    })  # fmt: skip
    name, config = family.scheduler
    scheduler = getattr(diffusers, name).from_config(config)
    parts = towers | {"vae": vae, "unet": unet, "scheduler": scheduler}
    for part, module in parts.items():
        module.save_pretrained(folder / part)
        library = type(module).__module__.partition(".")[0]
        index[part] = [library, type(module).__name__]
    for part in ("tokenizer", "tokenizer_2")[: 1 + family.xl]:
        _write_tokenizer(folder / part, bang=family.open_clip or part == "tokenizer_2")
        index[part] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_tokenizer(folder: Path, bang: bool) -> None:
    """vocab.json and merges.txt alone, as the hub's; `bang` pads with "!"."""
    made = trained_tokenizer(CLIPTokenizer)
    full = folder.with_name(f"{folder.name}-full")
    made.save_pretrained(full)
    model = json.loads((full / "tokenizer.json").read_text())["model"]
    shutil.rmtree(full)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "unk_token": end,
        "bos_token": "<|startoftext|>", "eos_token": end, "pad_token": "!" if bang else end,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _tower(open_clip: bool) -> CLIPTextModel:
    return _with_mean(CLIPTextModel(_tower_config(32, open_clip)))


def _with_mean(tower: Any) -> Any:
    """Tokens of trained towers have a mean, to which weighted ones are brought back."""
    with torch.no_grad():
        for name, tensor in tower.named_parameters():
            if name.endswith("final_layer_norm.bias"):
                tensor.fill_(0.2)
            elif name.endswith("token_embedding.weight"):
                tensor.add_(0.02)
    return tower


def _tower_config(width: int, open_clip: bool, **options: Any) -> CLIPTextConfig:
    tokenizer = trained_tokenizer(CLIPTokenizer)
    return CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=TOKENS,
        hidden_act="gelu" if open_clip else "quick_gelu", **options,
    )  # fmt: skip


def _xl_towers() -> dict[str, Any]:
    second = CLIPTextModelWithProjection(_tower_config(40, True, projection_dim=24))
    return {"text_encoder": _tower(False), "text_encoder_2": _with_mean(second)}


def _kl(xl: bool) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4,
        scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl, sample_size=64,
    )  # fmt: skip


def _vq() -> diffusers.VQModel:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, vq_embed_dim=4,
        num_vq_embeddings=64, scaling_factor=0.5,
    )  # fmt: skip
