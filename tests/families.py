"""Tiny checkpoints with the structure of published ones: classes, blocks, scheduler, tokenizers.

Widths, the depth of text towers, and vocabularies are reduced; the weights are random. Parts of
equal settings are made once. What follows was compared with published JSON, for which these copies
on GitHub were read:

- runwayml/stable-diffusion-v1-5: bigdataai-lab/stable-diffusion-v1-5;
  CompVis/stable-diffusion-v1-4: wswplay/stable-diffusion-v1-4
- SG161222/Realistic_Vision_V5.1_noVAE: smbands/realistic-vision-v51; wavymulder/portraitplus:
  jack-op11/portraitplus; gsdf/Counterfeit-V2.5 (UNet): qfz9527/Counterfeit-V2.5;
  Guizmus/Tardisfusion: AdamOswald/Tardis-fusion; hakurei/waifu-diffusion: havierYES/waifu_AI
  (commit b45bafc)
- stabilityai/stable-diffusion-2-1-base: jack-op11/stable-diffusion-2-1-base;
  stabilityai/stable-diffusion-2-1: jack-op11/stable-diffusion-2-1 and
  Vikas-2025/Hugging_face_sta_dif_2.1
- nota-ai/bk-sdm-base, -small, -tiny, -v2-small (UNets): Nota-NetsPresso/BK-SDM;
  segmind/small-sd and tiny-sd: what segmind/distill-sd removes of Stable Diffusion 1.5
- stabilityai/stable-diffusion-xl-base-1.0: andrewcchoi/stabilityai-stable-diffusion-xl-base-1.0
  (index) and PRITHIVSAKTHIUR/AI-Art-Generator-SDXL, a fine-tune;
  stabilityai/sdxl-turbo: DeveloperRadleighPompei/sdxl
- segmind/SSD-1B and Segmind-Vega (UNets): the depths in ComfyUI's table of models
- CompVis/ldm-celebahq-256 (VQModel): the configuration that several repositories repeat

Assumed, because no copy was found:
- SD-Turbo's UNet and LCM's `time_cond_proj_dim`, which tests of others quote
- the schedulers of stable-diffusion-2, SD-Turbo, LCM, BK-SDM and Segmind's, which follow their
  base or their card, and of Counterfeit-V2.5, whose copy has none: DDIM
- SDXL-Turbo's `timestep_spacing`: its copy has "linspace", with which one step would begin at
  timestep 0; "trailing" is the card's
- SDXL-Lightning and lcm-sdxl publish a UNet alone, of SDXL's structure; the scheduler is the card's
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from checkpoints import TOKENS, trained_tokenizer

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD_UNET = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "block_out_channels": (16, 32, 32, 32),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SD2_UNET = {
    **SD_UNET,
    "block_out_channels": (20, 40, 80, 80),
    "attention_head_dim": (5, 10, 20, 20),
    "norm_num_groups": 5,
    "use_linear_projection": True,
}
# BK-SDM leaves out every second layer, then the middle, and the tiny one the innermost stage too.
BK_BASE = {**SD_UNET, "layers_per_block": 1}
BK_SMALL = {**BK_BASE, "mid_block_type": None}
BK_TINY = {
    **BK_SMALL,
    "down_block_types": (CROSS_DOWN,) * 3,
    "up_block_types": (CROSS_UP,) * 3,
    "block_out_channels": (16, 32, 32),
}
BK_V2_SMALL = {**SD2_UNET, "layers_per_block": 1, "mid_block_type": None, "upcast_attention": True}
XL_UNET = {
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (20, 40, 80),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": 5,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "cross_attention_dim": 32 + 40,
}
# Segmind leaves out transformers, and those of the middle.
SSD_1B = {
    **XL_UNET,
    "transformer_layers_per_block": ((1,), (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {
    **SSD_1B,
    "transformer_layers_per_block": ((1,), (1, 1), (2, 2)),
    "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
}
LCM_UNET = {**SD_UNET, "time_cond_proj_dim": 16}
LATENT_3 = {"in_channels": 3, "out_channels": 3}

# Options as the files have them, also those that the scheduler's class does not know.
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
         "beta_schedule": "scaled_linear", "trained_betas": None}  # fmt: skip
OLD_BASE = BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
BASE = OLD_BASE | {"clip_sample": False, "prediction_type": "epsilon"}
V_BASE = BASE | {"prediction_type": "v_prediction"}
XL_BASE = BASE | {"interpolation_type": "linear", "sample_max_value": 1.0,
                  "timestep_spacing": "leading"}  # fmt: skip
OLD_PNDM = ("PNDMScheduler", OLD_BASE)
PNDM = ("PNDMScheduler", BASE)
PNDM_SPACED = ("PNDMScheduler", BASE | {"timestep_spacing": "leading"})
DDIM = ("DDIMScheduler", BETAS | {"clip_sample": False, "set_alpha_to_one": False,
                                  "steps_offset": 1})  # fmt: skip
OLD_DDIM = ("DDIMScheduler", BETAS | {"clip_sample": False, "set_alpha_to_one": False,
                                      "timestep_values": None})  # fmt: skip
CELEBA_DDIM = ("DDIMScheduler", BETAS | {"beta_start": 0.0015, "beta_end": 0.0195,
                                         "clip_sample": False})  # fmt: skip
DDIM_V = ("DDIMScheduler", V_BASE)
EULER = ("EulerDiscreteScheduler", XL_BASE | {"use_karras_sigmas": False})
TRAILING = (EULER[0], EULER[1] | {"timestep_spacing": "trailing"})
XL_TURBO = ("EulerAncestralDiscreteScheduler", XL_BASE | {"timestep_spacing": "trailing"})
LCM = ("LCMScheduler", BASE | {
    "set_alpha_to_one": True, "original_inference_steps": 50, "timestep_scaling": 10.0,
    "timestep_spacing": "leading", "rescale_betas_zero_snr": False, "thresholding": False,
})  # fmt: skip

CHECKER = {
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
NO_CHECKER = {**CHECKER, "safety_checker": [None, None], "requires_safety_checker": False}


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
        layers: of each block of the UNet and the autoencoder.
    """

    unet: dict[str, Any] = field(default_factory=lambda: SD_UNET)
    scheduler: tuple[str, dict[str, Any]] = PNDM
    open_clip: bool = False
    xl: bool = False
    vq: bool = False
    steps: int = 4
    guidance_scale: float = 7.5
    index: dict[str, Any] = field(default_factory=lambda: CHECKER)
    layers: int = 2

    @property
    def pipeline(self) -> str:
        if self.xl:
            return "StableDiffusionXLPipeline"
        lcm = "time_cond_proj_dim" in self.unet
        return "LatentConsistencyModelPipeline" if lcm else "StableDiffusionPipeline"

    @property
    def latent_channels(self) -> int:
        return self.unet.get("in_channels", 4)


def shallow(family: Family) -> Family:
    """The family with its outermost and innermost blocks, of one layer, which exports sooner.

    Segmind's depths need all blocks and layers.
    """
    unet = family.unet
    if "reverse_transformer_layers_per_block" in unet:
        return family
    levels = len(unet["down_block_types"])
    unet = {
        name: (value[0], value[-1]) if isinstance(value, tuple) and len(value) == levels else value
        for name, value in unet.items()
    }
    if family.xl:
        unet["transformer_layers_per_block"] = (1, 2)
    return replace(family, unet=unet, layers=1)


def _xl(unet: dict[str, Any] = XL_UNET, scheduler: tuple = EULER, **options: Any) -> Family:
    zeros = {"force_zeros_for_empty_prompt": True}
    return Family(unet, scheduler, xl=True, index=zeros, **options)


def _sd2(unet: dict[str, Any], scheduler: tuple, **options: Any) -> Family:
    return Family(unet, scheduler, open_clip=True, index=NO_CHECKER, **options)


DISTILLED = {"steps": 1, "guidance_scale": 0.0}
FAMILIES: dict[str, Family] = {
    "runwayml/stable-diffusion-v1-5": Family(scheduler=OLD_PNDM),
    "CompVis/stable-diffusion-v1-4": Family(scheduler=OLD_PNDM),
    "SG161222/Realistic_Vision_V5.1_noVAE": Family(scheduler=PNDM_SPACED),
    "wavymulder/portraitplus": Family(),
    "gsdf/Counterfeit-V2.5": Family(scheduler=DDIM),
    "Guizmus/Tardisfusion": Family(scheduler=DDIM),
    "hakurei/waifu-diffusion": Family(scheduler=OLD_DDIM),
    "stabilityai/stable-diffusion-2-1-base": _sd2(SD2_UNET, PNDM),
    "stabilityai/stable-diffusion-2-1": _sd2(SD2_UNET | {"upcast_attention": True}, DDIM_V),
    "stabilityai/stable-diffusion-2": _sd2(SD2_UNET, DDIM_V),
    "stabilityai/sd-turbo": _sd2(SD2_UNET, TRAILING, **DISTILLED),
    "SimianLuo/LCM_Dreamshaper_v7": Family(LCM_UNET, LCM),
    "nota-ai/bk-sdm-base": Family(BK_BASE),
    "nota-ai/bk-sdm-small": Family(BK_SMALL),
    "nota-ai/bk-sdm-tiny": Family(BK_TINY),
    "nota-ai/bk-sdm-v2-small": _sd2(BK_V2_SMALL, DDIM_V),
    "segmind/small-sd": Family(BK_BASE, DDIM),
    "segmind/tiny-sd": Family(BK_TINY, DDIM),
    "stabilityai/stable-diffusion-xl-base-1.0": _xl(guidance_scale=5.0),
    "stabilityai/sdxl-turbo": _xl(scheduler=XL_TURBO, **DISTILLED),
    "ByteDance/SDXL-Lightning": _xl(scheduler=TRAILING, guidance_scale=0.0),
    "latent-consistency/lcm-sdxl": _xl(
        XL_UNET | {"time_cond_proj_dim": 16}, LCM, guidance_scale=8.0
    ),
    "segmind/SSD-1B": _xl(SSD_1B, guidance_scale=9.0),
    "segmind/Segmind-Vega": _xl(VEGA, guidance_scale=9.0),
    "VQModel of CompVis/ldm-celebahq-256": Family(SD_UNET | LATENT_3, CELEBA_DDIM, vq=True),
}


def write_family(folder: Path, family: Family) -> Path:
    """Writes the checkpoint of a family; equal settings give equal weights."""
    index: dict[str, Any] = {"_class_name": family.pipeline, **family.index}
    torch.manual_seed(1)
    towers = _xl_towers() if family.xl else {"text_encoder": _tower(family.open_clip)}
    torch.manual_seed(2)
    vae = _vq(family.layers) if family.vq else _kl(family.xl, family.layers)
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(**{
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32,
        "layers_per_block": family.layers, **family.unet,
    })  # fmt: skip
    for part, module in (towers | {"vae": vae, "unet": unet}).items():
        module.save_pretrained(folder / part)
        library = type(module).__module__.partition(".")[0]
        index[part] = [library, type(module).__name__]
    name, config = family.scheduler
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, **config}))
    index["scheduler"] = ["diffusers", name]
    for part in ("tokenizer", "tokenizer_2")[: 1 + family.xl]:
        _write_tokenizer(folder / part, bang=family.open_clip or part == "tokenizer_2")
        index[part] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Ids and merges of a tiny CLIP tokenizer; "!" is the first id and the marks are the last."""
    model = json.loads(trained_tokenizer(CLIPTokenizer).backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda t: (t in (START, END), t != "!", model["vocab"][t]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {token: number for number, token in enumerate(tokens)}, merges


def _write_tokenizer(folder: Path, bang: bool) -> None:
    """The four files of the hub's; of those that pad with "!", only the second map says so."""
    ids, merges = _vocabulary()
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    marks = {
        name: {"content": token, **mark}
        for name, token in (("bos_token", START), ("eos_token", END), ("unk_token", END))
    }
    settings = {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace",
        "model_max_length": TOKENS, "pad_token": END, "tokenizer_class": "CLIPTokenizer",
        **{name: {"__type": "AddedToken", **value} for name, value in marks.items()},
    }  # fmt: skip
    special = marks | {"pad_token": "!" if bang else END}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


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
    """The ids of marks are those that the files name, which are not the tokenizer's."""
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()[0]), bos_token_id=0, eos_token_id=2, pad_token_id=1,
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=TOKENS,
        hidden_act="gelu" if open_clip else "quick_gelu", **options,
    )  # fmt: skip


def _xl_towers() -> dict[str, Any]:
    second = CLIPTextModelWithProjection(_tower_config(40, True, projection_dim=24))
    return {"text_encoder": _tower(False), "text_encoder_2": _with_mean(second)}


def _kl(xl: bool, layers: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=layers, norm_num_groups=4,
        latent_channels=4, scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl,
        sample_size=128,
    )  # fmt: skip


def _vq(layers: int) -> diffusers.VQModel:
    """With codes as far apart as latents are, or the last bit of a sum decides on the nearest."""
    vae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=layers, norm_num_groups=4,
        latent_channels=3, num_vq_embeddings=64, sample_size=64,
    )  # fmt: skip
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae
