"""Tiny random checkpoints of the served classes, so that tests need no training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from export.fusion_head import FusionHead

CAPTIONS = ["a large red circle left of a small blue square", "two green stars on white"] * 4
TOKENS = 16


def tiny_checkpoint(folder: Path, timestep_cond: int | None = None) -> Path:
    """Writes a checkpoint of 32-pixel pictures whose parts all do something."""
    torch.manual_seed(0)
    clip_tokenizer = CLIPTokenizer().train_new_from_iterator(CAPTIONS, 300)
    bert_tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, 300)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": TOKENS}  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id, **tower,
        )
    )  # fmt: skip
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **tower))
    fusion = FusionHead(width=32, bert_width=32, bert_layers=(1, 2), heads=2)
    for level in fusion.levels:
        torch.nn.init.constant_(level.attention_gate, 0.5)
        torch.nn.init.constant_(level.feed_forward_gate, 0.5)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
        time_cond_proj_dim=timestep_cond,
    )  # fmt: skip
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, vq_embed_dim=4,
        num_vq_embeddings=64, scaling_factor=0.5,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    parts = {
        "tokenizer": clip_tokenizer, "text_encoder": clip, "tokenizer_2": bert_tokenizer,
        "text_encoder_2": bert, "fusion": fusion, "unet": unet, "vae": vae,
        "scheduler": scheduler,
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["", type(part).__name__] for name, part in parts.items()}
    index["defaults"] = {"steps": 4, "guidance_scale": 3.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
