"""`python -m training.diffusion`: the fusion head and the UNet, with both encoders frozen.

Latent diffusion (arXiv:2112.10752) with v-prediction (arXiv:2202.00512, appendix D) and a
schedule that ends in pure noise (arXiv:2305.08891). A tenth of the captions is dropped for
classifier-free guidance. Writes `fusion/`, `unet/`, `scheduler/` and `model_index.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from export.fusion_head import FusionHead
from export.preview import fit_preview
from training import data
from training.cli import stage_cli
from training.loop import Trainer
from training.scenes import describe

SCENES = 40_000  # distinct pictures; each gets a new caption every time it is drawn
BERT_LAYERS = (2, 4)
CAPTION_DROP = 0.1
DEFAULTS = {"steps": 12, "guidance_scale": 3.0}  # of requests that name none


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


class Painter(nn.Module):
    """What is trained: the fusion head and the UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = FusionHead(width=128, bert_width=128, bert_layers=BERT_LAYERS, heads=4)
        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, block_out_channels=(96, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
        )  # fmt: skip


class Encoders:
    """The frozen CLIP and BERT of a checkpoint, from texts to what the fusion head takes."""

    def __init__(self, checkpoint: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.clip = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
        self.tokenizer_2 = BertTokenizer.from_pretrained(checkpoint / "tokenizer_2")
        self.bert = BertModel.from_pretrained(
            checkpoint / "text_encoder_2", add_pooling_layer=False
        ).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids, _ = data.token_ids(self.tokenizer, texts)
        ids_2, mask = data.token_ids(self.tokenizer_2, texts)
        states = self.bert(ids_2, attention_mask=mask, output_hidden_states=True).hidden_states
        return (
            self.clip(ids).last_hidden_state,
            torch.stack([states[i] for i in BERT_LAYERS], dim=1),
            mask,
        )


def latents(checkpoint: Path, runs: Path) -> Tensor:
    """Scaled latents of the training scenes (SCENES, 8, 8, 8), encoded once and kept."""
    path = runs / f"latents-{SCENES}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    vae = VQModel.from_pretrained(checkpoint / "vae").eval()
    parts = []
    with torch.no_grad():
        for seed in range(SCENES // 100):
            batch, _ = data.scenes(50_000_000 + seed, 100)
            parts.append(vae.encode(data.pictures(batch)).latents * vae.config.scaling_factor)
    np.save(path, torch.cat(parts).numpy())
    return torch.cat(parts)


class Batches:
    """Latents of the training scenes, each time with a new caption: a pure function of a step."""

    def __init__(self, checkpoint: Path, runs: Path, batch: int):
        self.batch = batch
        self._latents = latents(checkpoint, runs)
        seeds = range(SCENES // 100)
        self._truth = [s for seed in seeds for s in data.scenes(50_000_000 + seed, 100)[0]]

    def at(self, step: int) -> tuple[Tensor, list[str], np.random.Generator]:
        """Clean latents (B, C, h, w), their captions, and a generator for what else is drawn."""
        rng = np.random.default_rng(60_000_000 + step)
        chosen = rng.integers(SCENES, size=self.batch)
        return self._latents[chosen], [describe(self._truth[i], rng) for i in chosen], rng


def noised(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t at `alpha_bar` (B,)."""
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def train(checkpoint: Path, runs: Path, steps: int, batch: int, bf16: bool) -> None:
    batches = Batches(checkpoint, runs, batch)
    encoders = Encoders(checkpoint)
    alphas_cumprod = scheduler().alphas_cumprod
    torch.manual_seed(0)
    painter = Painter()

    def loss_at(step: int) -> dict[str, Tensor]:
        x0, texts, rng = batches.at(step)
        texts = ["" if rng.random() < CAPTION_DROP else text for text in texts]
        draw = torch.Generator().manual_seed(step)
        noise = torch.randn(x0.shape, generator=draw)
        t = torch.randint(1000, (batch,), generator=draw)
        x_t = noised(x0, noise, alphas_cumprod[t])
        v = noised(noise, -x0, alphas_cumprod[t])
        hidden = painter.fusion(*encoders(texts))
        v_pred = painter.unet(x_t, t, encoder_hidden_states=hidden).sample
        return {"loss": F.mse_loss(v_pred.float(), v)}

    trainer = Trainer(painter, runs / "diffusion", steps, 8e-4, 0.999, bf16=bf16)
    trained = trainer.run(loss_at)
    trained.fusion.save_pretrained(checkpoint / "fusion")
    trained.unet.save_pretrained(checkpoint / "unet")
    write_index(checkpoint, scheduler(), DEFAULTS)


@torch.no_grad()
def latent_to_rgb(checkpoint: Path) -> list[list[float]]:
    """The map of previews, fitted on true pictures."""
    vae = VQModel.from_pretrained(checkpoint / "vae").eval()
    batch, _ = data.scenes(59_999_999, 512)
    pictures = data.pictures(batch)
    return fit_preview(vae.encode(pictures).latents * vae.config.scaling_factor, pictures)


def write_index(checkpoint: Path, noise_schedule: SchedulerMixin, defaults: dict) -> None:
    """Writes `scheduler/` and `model_index.json`, which names the class of every part."""
    noise_schedule.save_pretrained(checkpoint / "scheduler")
    index = {
        "_class_name": "TwinbrushPipeline",
        "defaults": defaults,
        "latent_to_rgb": latent_to_rgb(checkpoint),
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer_2": ["transformers", "BertTokenizer"],
        "text_encoder_2": ["transformers", "BertModel"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "fusion": ["export.fusion_head", "FusionHead"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", type(noise_schedule).__name__],
    }
    (checkpoint / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stage_cli(train, steps=7000, batch=64)
