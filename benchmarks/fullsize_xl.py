"""A checkpoint of SDXL's exact size with random weights in FP16, for `benchmarks.fullsize`.

The configurations are those of stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.fullsize_stages import CAPTIONS, CLIP

SIDE, STEPS = 512, 2
GOALS = {"export_peak_gb": 20, "serve_peak_gb": 20}
DISK, MEMORY = 16e9, 20e9  # bytes that must be free
OPEN_CLIP = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "max_position_embeddings": 77, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "sample_size": 1024, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.13025,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "force_upcast": True,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, one part after the other, each made in FP16."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    tokenizer = CLIPTokenizer().train_new_from_iterator(CAPTIONS, 1000)
    tokenizer.model_max_length = 77
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    index: dict[str, object] = {
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
    }  # fmt: skip
    for name, make in {
        "tokenizer": lambda: tokenizer,
        "tokenizer_2": lambda: tokenizer,
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP, **special)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig(**OPEN_CLIP, **special)
        ),
        "scheduler": lambda: EulerDiscreteScheduler(**SCHEDULER),
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
    }.items():
        part = make()
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        del part
    (folder / "model_index.json").write_text(json.dumps(index))
