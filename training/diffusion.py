"""`python -m training.diffusion`: the fusion head and the UNet, with both encoders frozen.

Latent diffusion (arXiv:2112.10752) with v-prediction (arXiv:2202.00512, appendix D) and a
schedule that ends in pure noise (arXiv:2305.08891). A tenth of the captions is dropped for
classifier-free guidance. If the source has an objective of its own, the head's tokens learn that
too. Writes `fusion/`, `unet/` (in FP16, half the size), `scheduler/` and `model_index.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from networks.fusion_head import FusionHead
from networks.loading import load_part
from networks.preview import fit_preview
from training import data
from training.cli import stage_cli
from training.latents import LATENT_CELL, encoded, latent_batches, noised
from training.run import Run, check_trained, load_start, save_part
from training.sampling import Sampler

STEPS, BATCH = 3000, 64
FROZEN = ("text_encoder", "bert", "vae")
BERT_LAYERS = (2, 4)
OBJECTIVE = 0.1  # weight of the source's own objective beside the error of v
LEARNING_RATE, EMA_DECAY = 8e-4, 0.999
TIMESTEP_POWER = 0.6  # of an even draw: 38% lie above 750, for layout, 7% below 200, for outlines
DEFAULTS = {"steps": 12, "guidance_scale": 2.0}  # of requests that name none


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


class Painter(nn.Module):
    """What is trained: the fusion head, the UNet, and the weights of the source's objective.

    Args:
        side: of the pictures in pixels.
        channels: of the UNet's first level, a multiple of 32; the second has twice as many.
    """

    def __init__(
        self, side: int = 64, channels: int = 96, objective: data.Objective | None = None
    ) -> None:
        super().__init__()
        self.fusion = FusionHead(width=128, bert_width=128, bert_layers=BERT_LAYERS, heads=4)
        self.unet = UNet2DConditionModel(
            sample_size=side // LATENT_CELL, in_channels=8, out_channels=8,
            block_out_channels=(channels, 2 * channels),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
        )  # fmt: skip
        self.objective = objective.module(128) if objective else None


class Encoders:
    """The frozen CLIP and BERT of a checkpoint, from texts to the fusion head's inputs."""

    def __init__(self, checkpoint: Path, device: torch.device = data.CPU):
        self.device = device
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.clip = load_part(checkpoint / "text_encoder", CLIPTextModel).to(device)
        self.bert_tokenizer = BertTokenizer.from_pretrained(checkpoint / "bert_tokenizer")
        bert = load_part(checkpoint / "bert", BertModel, add_pooling_layer=False)
        self.bert = bert.to(device)

    @property
    def stream_tokenizer(self) -> CLIPTokenizer:
        """Of the tokens that the fusion head gives."""
        return self.tokenizer

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        layers, mask = self.bert_layers(texts)
        return self.clip_states(texts)[0], layers, mask

    @torch.no_grad()
    def clip_states(self, texts: list[str]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """CLIP's tokens (B, L, width), and the hidden states of every layer before them."""
        ids, _ = data.token_ids(self.tokenizer, texts, self.device)
        output = self.clip(ids, output_hidden_states=True)
        return output.last_hidden_state, output.hidden_states

    @torch.no_grad()
    def bert_layers(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """BERT's hidden states at `BERT_LAYERS` (B, layers, L, width), and the mask (B, L)."""
        ids, mask = data.token_ids(self.bert_tokenizer, texts, self.device)
        states = self.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([states[i] for i in BERT_LAYERS], dim=1), mask


def velocity_loss(
    painter: Painter,
    encoders: Encoders,
    batches: data.Batches,
    first: int,
    objective: data.Objective | None,
) -> Callable[[int], dict[str, Tensor]]:
    """The loss of a step: squared error of v, and the source's objective on the head's tokens.

    Steps take the draws from `first`. More timesteps lie at the noisy end, where captions matter
    and sampling starts.
    """
    device = next(painter.parameters()).device
    alphas_cumprod = scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(first + step)
        x0, texts = drawn.latents, drawn.dropped()
        draw = torch.Generator().manual_seed(first + step)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = (1000 * torch.rand(len(x0), generator=draw) ** TIMESTEP_POWER).long().to(device)
        x_t = noised(x0, noise, alphas_cumprod[t])
        v = noised(noise, -x0, alphas_cumprod[t])
        hidden = painter.fusion(*encoders(texts))
        v_pred = painter.unet(x_t, t, encoder_hidden_states=hidden).sample
        error = F.mse_loss(v_pred.float(), v)
        if objective is None:
            return {"loss": error}
        targets = objective.targets(encoders.stream_tokenizer, texts, drawn.truth).to(device)
        further, accuracies = objective.loss(painter.objective, hidden, targets)
        return {"loss": error + OBJECTIVE * further, "error": error, **accuracies}

    return loss_at


def train(run: Run) -> None:
    check_trained(run.checkpoint, *FROZEN)
    encoders = Encoders(run.checkpoint, run.device)
    torch.manual_seed(run.seed)
    painter = new_painter(run).to(run.device)
    start = [run.init / part for part in ("fusion", "unet")] if run.init else []
    first = run.first(start)
    batches = latent_batches(run, first)
    sampler = Sampler(run.checkpoint, encoders, run.source, run.device)
    reads = [*(run.checkpoint / part for part in FROZEN), *start]
    trained = run.trainer(painter, "diffusion", LEARNING_RATE, EMA_DECAY, reads).run(
        velocity_loss(painter, encoders, batches, first, run.source.objective),
        batches,
        lambda averaged: sampler.sheet(averaged.unet, averaged.fusion, scheduler(), DEFAULTS),
    )
    save_part(trained.fusion, run.checkpoint / "fusion")
    save_part(trained.unet.half(), run.checkpoint / "unet")
    write_index(run.checkpoint, scheduler(), DEFAULTS, run.source)


def new_painter(run: Run) -> Painter:
    """With random weights, or those of `run.init`.

    Raises:
        BadInput: `run.init` lacks these parts, or they have another shape.
    """
    painter = Painter(run.source.side, objective=run.source.objective)
    if run.init is not None:
        for part in ("fusion", "unet"):
            load_start(getattr(painter, part), run.init / part / SAFETENSORS_WEIGHTS_NAME, part)
    return painter


@torch.no_grad()
def latent_to_rgb(checkpoint: Path, source: data.Source) -> list[list[float]]:
    """The map of previews, fitted on true pictures."""
    vae = load_part(checkpoint / "vae", VQModel)
    pictures = source.sample(59_999_999, 512).pictures
    return fit_preview(encoded(vae, pictures), pictures)


def write_index(
    checkpoint: Path, noise_schedule: SchedulerMixin, defaults: dict, source: data.Source
) -> None:
    """Writes `scheduler/` and `model_index.json`, which names the class of every part."""
    noise_schedule.save_pretrained(checkpoint / "scheduler")
    index = {
        "_class_name": "TwinbrushPipeline",
        "defaults": defaults,
        "latent_to_rgb": latent_to_rgb(checkpoint, source),
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "bert_tokenizer": ["transformers", "BertTokenizer"],
        "bert": ["transformers", "BertModel"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "fusion": ["networks.fusion_head", "FusionHead"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", type(noise_schedule).__name__],
    }
    (checkpoint / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
