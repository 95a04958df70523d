"""Tiny random checkpoints of the served classes, so that tests need no training."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel, VQModel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    GPT2Tokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5Model,
    T5Tokenizer,
)

from networks.fusion_head import FusionHead

CAPTIONS = ["a large red circle left of a small blue square", "two green stars on white"] * 4
TOKENS = 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": TOKENS}  # fmt: skip
# Configuration, model and tokenizer classes of text models that may stand beside CLIP.
TEXT_MODELS = {
    "bert": (BertConfig, BertModel, BertTokenizer, TOWER),
    "roberta": (RobertaConfig, RobertaModel, RobertaTokenizer,
                TOWER | {"max_position_embeddings": TOKENS + 2}),
    "distilbert": (DistilBertConfig, DistilBertModel, BertTokenizer,
                   {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 2}),
    "gpt2": (GPT2Config, GPT2Model, GPT2Tokenizer, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "t5": (T5Config, T5Model, T5Tokenizer,
           {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
}  # fmt: skip


def text_model(folder: Path, kind: str) -> Path:
    """Writes a text model with its tokenizer, as a hub repository holds them."""
    torch.manual_seed(0)
    config_class, model_class, tokenizer_class, sizes = TEXT_MODELS[kind]
    tokenizer = trained_tokenizer(tokenizer_class)
    special = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, name) is not None
    }
    model_class(config_class(vocab_size=len(tokenizer), **special, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_checkpoint(folder: Path, timestep_cond: int | None = None) -> Path:
    """Writes a checkpoint of 32-pixel pictures whose parts all do something."""
    torch.manual_seed(0)
    bert_tokenizer = trained_tokenizer(BertTokenizer)
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **TOWER))
    fusion = FusionHead(width=32, bert_width=32, bert_layers=(1, 2), heads=2)
    for level in fusion.levels:
        torch.nn.init.constant_(level.attention_gate, 0.5)
        torch.nn.init.constant_(level.feed_forward_gate, 0.5)
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, vq_embed_dim=4,
        num_vq_embeddings=64, scaling_factor=0.5,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    parts = _clip() | {
        "bert_tokenizer": bert_tokenizer, "bert": bert, "fusion": fusion,
        "unet": _unet(timestep_cond), "vae": vae, "scheduler": scheduler,
    }  # fmt: skip
    return _save(parts, folder, {"defaults": {"steps": 4, "guidance_scale": 3.0}})


def stable_diffusion(folder: Path, distilled: bool) -> Path:
    """Writes a checkpoint as Stable Diffusion 1.5 is one, or distilled as LCM is."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}  # fmt: skip
    scheduler = (LCMScheduler if distilled else DDIMScheduler)(**schedule)
    pipeline = "LatentConsistencyModelPipeline" if distilled else "StableDiffusionPipeline"
    parts = _clip() | {"vae": vae, "scheduler": scheduler}
    parts["unet"] = _unet(timestep_cond=16 if distilled else None)  # last: it alone differs
    return _save(parts, folder, {"_class_name": pipeline, "_diffusers_version": "0.42.1"})


@cache  # two trainings number the same tokens differently
def trained_tokenizer(tokenizer_class: type) -> Any:
    tokenizer = tokenizer_class().train_new_from_iterator(CAPTIONS, 300)
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _clip() -> dict:
    tokenizer = trained_tokenizer(CLIPTokenizer)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **TOWER,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def _unet(timestep_cond: int | None) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
        time_cond_proj_dim=timestep_cond,
    )  # fmt: skip


def _save(parts: dict, folder: Path, index: dict) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name, part in parts.items():
        library = type(part).__module__.partition(".")[0]
        index = index | {name: [library, type(part).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
