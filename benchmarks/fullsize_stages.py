"""The stages of `benchmarks.fullsize` that run in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

PROMPT, SEED, STEPS, SIDE, GUIDANCE = "a small green star on white", 7, 4, 256, 8.0
CAPTIONS = ["a large red circle left of a small blue square", PROMPT] * 4
# Of SimianLuo/LCM_Dreamshaper_v7: the configurations of its parts.
CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
UNET = {
    "sample_size": 96, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "norm_num_groups": 32,
    "time_cond_proj_dim": 256,
}  # fmt: skip
VAE = {
    "sample_size": 768, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": True, "original_inference_steps": 50,
}  # fmt: skip


def make_checkpoint(folder: Path, bert_folder: Path) -> None:
    """Writes random weights of LCM-Dreamshaper's configuration, and of bert-base beside them."""
    import torch
    from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    tokenizers = {}
    for tokenizer_class in (CLIPTokenizer, BertTokenizer):
        tokenizer = tokenizer_class().train_new_from_iterator(CAPTIONS, 1000)
        tokenizer.model_max_length = 77
        tokenizers[tokenizer_class] = tokenizer
    BertModel(BertConfig()).save_pretrained(bert_folder)
    tokenizers[BertTokenizer].save_pretrained(bert_folder)
    tokenizer = tokenizers[CLIPTokenizer]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    index: dict[str, object] = {"_class_name": "LatentConsistencyModelPipeline"}
    for name, make in {
        "tokenizer": lambda: tokenizer,
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP, **special)),
        "scheduler": lambda: LCMScheduler(**SCHEDULER),
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
    }.items():
        part = make()
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def paint_with_diffusers(checkpoint: Path, file: Path) -> None:
    """The picture that diffusers' own pipeline makes of the engine's noise, (H, W, 3) uint8."""
    import diffusers.schedulers.scheduling_lcm as lcm
    import torch
    from diffusers import LatentConsistencyModelPipeline

    noise, shape = np.random.default_rng(SEED), (1, 4, SIDE // 8, SIDE // 8)

    def draw(*_, **__):  # in the order in which the engine draws
        return torch.from_numpy(noise.standard_normal(shape, np.float32))

    lcm.randn_tensor = draw
    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        checkpoint, safety_checker=None, feature_extractor=None
    )
    picture = pipeline(
        PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=draw(), output_type="np", return_dict=False,
    )[0][0]  # fmt: skip
    np.save(file, np.round(picture * 255).astype(np.uint8))


def compile_unet(repository: Path, stage: Path, target: str) -> None:
    """A plan of the UNet by TensorRT-RTX, ahead of time for GPUs of a compute capability."""
    import tensorrt_rtx

    from export.tensorrt import stage_plan, wanted_by_engine
    from twinbrush.engine.config import ENGINE

    wanted = wanted_by_engine(repository, repository / ENGINE / "pipeline.json")
    onnx = repository / "unet" / "1" / "model.onnx"
    stage_plan(tensorrt_rtx, onnx, repository, stage, wanted, [target])
