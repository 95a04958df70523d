"""`python -m training.diffusion`: the fusion head and the UNet, with both encoders frozen.

Latent diffusion (arXiv:2112.10752) with v-prediction (arXiv:2202.00512, appendix D) and a
schedule that ends in pure noise (arXiv:2305.08891). A tenth of the captions is dropped for
classifier-free guidance. Where the truth of captions is known, the head's tokens are asked for
it: see `grounding`. Writes `fusion/`, `unet/` (in FP16, half the size), `scheduler/` and
`model_index.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from examples.scenes.grounding import Questions, word_answers
from examples.scenes.scenes import Scene, describe
from networks.fusion_head import FusionHead
from networks.loading import load_part
from networks.preview import fit_preview
from training import data
from training.cli import stage_cli
from training.run import Run, check_trained, digest, load_start, save_part
from training.sampling import Sampler

STEPS, BATCH = 3000, 64
LATENT_CELL = 8  # pixels a side
SCENES = 40_000  # distinct pictures; each gets a new caption every time it is drawn
FIRST_DRAW = 60_000_000  # the seed of what the first step draws
FROZEN = ("text_encoder", "text_encoder_2", "vae")
BERT_LAYERS = (2, 4)
CAPTION_DROP = 0.1
GROUNDING = 0.1  # weight of the questions beside the error of v
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
    """What is trained: the fusion head and the UNet, and questions to the head.

    Args:
        side: of the pictures in pixels.
        channels: of the UNet's first level, a multiple of 32; the second has twice as many.
    """

    def __init__(self, side: int = 64, channels: int = 96) -> None:
        super().__init__()
        self.fusion = FusionHead(width=128, bert_width=128, bert_layers=BERT_LAYERS, heads=4)
        self.unet = UNet2DConditionModel(
            sample_size=side // LATENT_CELL, in_channels=8, out_channels=8,
            block_out_channels=(channels, 2 * channels),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
        )  # fmt: skip
        self.questions = Questions(128)


class Encoders:
    """The frozen CLIP and BERT of a checkpoint, from texts to what the fusion head takes."""

    def __init__(self, checkpoint: Path, device: torch.device = data.CPU):
        self.device = device
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.clip = load_part(checkpoint / "text_encoder", CLIPTextModel).to(device)
        self.tokenizer_2 = BertTokenizer.from_pretrained(checkpoint / "tokenizer_2")
        self.bert = load_part(checkpoint / "text_encoder_2", BertModel, add_pooling_layer=False).to(
            device
        )

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        layers, mask = self.bert_layers(texts)
        return self.clip_states(texts)[0], layers, mask

    @torch.no_grad()
    def clip_states(self, texts: list[str]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """CLIP's tokens (B, L, width), and the hidden states of every layer before them."""
        ids, _ = data.token_ids(self.tokenizer, texts, self.device)
        said = self.clip(ids, output_hidden_states=True)
        return said.last_hidden_state, said.hidden_states

    @torch.no_grad()
    def bert_layers(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """BERT's hidden states at `BERT_LAYERS` (B, layers, L, width), and the mask (B, L)."""
        ids, mask = data.token_ids(self.tokenizer_2, texts, self.device)
        states = self.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([states[i] for i in BERT_LAYERS], dim=1), mask

    def answers(self, texts: list[str], scenes: list[Scene]) -> Tensor:
        """What the head's tokens are to answer: see `grounding.word_answers`."""
        return word_answers(self.tokenizer, texts, scenes).to(self.device)


@torch.no_grad()
def latents(checkpoint: Path, runs: Path, truth: list[Scene], device: torch.device) -> Tensor:
    """Scaled latents of scenes (N, C, h, w), encoded once for each VQGAN and kept in `runs`."""
    vae = load_part(checkpoint / "vae", VQModel).to(device)
    made_from = digest([checkpoint / "vae"]) + repr(truth)
    path = runs / f"latents-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path)).to(device)
    parts = []
    for start in range(0, len(truth), 100):
        pictures = data.pictures(truth[start : start + 100]).to(device)
        parts.append(encoded(vae, pictures))
    runs.mkdir(parents=True, exist_ok=True)
    whole = torch.cat(parts).contiguous()  # as it is read back: another layout rounds otherwise
    part = path.with_suffix(".part.npy")
    np.save(part, whole.cpu().numpy())
    os.replace(part, path)
    return whole


@torch.no_grad()
def encoded(vae: VQModel | AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents as the UNet knows them, (B, C, h, w), of pictures in [-1, 1], (B, 3, H, W)."""
    said = vae.encode(pictures)
    found = said.latents if isinstance(vae, VQModel) else said.latent_dist.mode()
    return (found - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


class LatentBatch(NamedTuple):
    """What the UNet sees at a step.

    Attributes:
        latents: clean and scaled, (B, C, h, w).
        captions: one a picture.
        rng: a generator for what else is drawn.
        scenes: what each caption is true of; empty where only its words are known.
    """

    latents: Tensor
    captions: list[str]
    rng: np.random.Generator
    scenes: list[Scene]


class Batches:
    """Latents of the training scenes, each time with a new caption: a pure function of a step."""

    position = None

    def __init__(self, checkpoint: Path, runs: Path, batch: int, device: torch.device = data.CPU):
        self.batch = batch
        seeds = range(50_000_000, 50_000_000 + SCENES // 100)
        self._truth = [scene for seed in seeds for scene in data.scenes(seed, 100)[0]]
        self._latents = latents(checkpoint, runs, self._truth, device)

    def resume(self, position: dict | None) -> None:
        data.check_no_position(position)

    def at(self, step: int) -> LatentBatch:
        rng = np.random.default_rng(FIRST_DRAW + step)
        chosen = rng.integers(SCENES, size=self.batch)
        scenes = [self._truth[i] for i in chosen]
        return LatentBatch(
            self._latents[chosen], [describe(scene, rng) for scene in scenes], rng, scenes
        )

    def report(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was started."""


class EncodedBatches:
    """Latents of batches of pictures, encoded as they come, and their captions.

    Of batches that have no pictures there are no latents.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], batches: data.Batches):
        self._encode, self._batches = encode, batches

    @property
    def position(self) -> dict | None:
        return self._batches.position

    def resume(self, position: dict | None) -> None:
        self._batches.resume(position)

    def at(self, step: int) -> LatentBatch:
        drawn = self._batches.at(step)
        clean = drawn.pictures
        if len(clean):
            with torch.autocast(clean.device.type, enabled=False):
                clean = self._encode(clean)
        rng = np.random.default_rng(FIRST_DRAW + step)
        return LatentBatch(clean, drawn.captions, rng, drawn.scenes)

    def report(self) -> str:
        return self._batches.report()

    def close(self) -> None:
        self._batches.close()


def latent_batches(run: Run, first: int) -> Batches | EncodedBatches:
    """Clean latents and captions of a source: of scenes encoded once, of others as they come.

    Others come in an order of the draws from `first`.
    """
    if isinstance(run.source, data.SceneWorld):
        return Batches(run.checkpoint, run.runs, run.batch, run.device)
    batches = run.source.batches(FIRST_DRAW + first, run.batch, run.device)
    vae = load_part(run.checkpoint / "vae", VQModel).to(run.device)
    return EncodedBatches(partial(encoded, vae), batches)


def noised(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t at `alpha_bar` (B,)."""
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def velocity_loss(
    painter: Painter, encoders: Encoders, batches: Batches | EncodedBatches, first: int
) -> Callable[[int], dict[str, Tensor]]:
    """The loss of a step: squared error of v, some captions dropped, and of what tokens tell.

    Steps take the draws from `first`. More timesteps lie at the noisy end, where captions matter
    and sampling starts.
    """
    device = next(painter.parameters()).device
    alphas_cumprod = scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        x0, texts, rng, scenes = batches.at(first + step)
        texts = ["" if rng.random() < CAPTION_DROP else text for text in texts]
        draw = torch.Generator().manual_seed(first + step)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = (1000 * torch.rand(len(x0), generator=draw) ** TIMESTEP_POWER).long().to(device)
        x_t = noised(x0, noise, alphas_cumprod[t])
        v = noised(noise, -x0, alphas_cumprod[t])
        hidden = painter.fusion(*encoders(texts))
        v_pred = painter.unet(x_t, t, encoder_hidden_states=hidden).sample
        error = F.mse_loss(v_pred.float(), v)
        if not scenes:
            return {"loss": error}
        asked, accuracies = painter.questions.losses(hidden, encoders.answers(texts, scenes))
        return {"loss": error + GROUNDING * asked, "error": error, **accuracies}

    return loss_at


def train(run: Run) -> None:
    check_trained(run.checkpoint, *FROZEN)
    encoders = Encoders(run.checkpoint, run.device)
    torch.manual_seed(run.seed)
    painter = new_painter(run).to(run.device)
    goes_on = [run.init / part for part in ("fusion", "unet")] if run.init else []
    first = run.first(goes_on)
    batches = latent_batches(run, first)
    sampler = Sampler(run.checkpoint, encoders, run.source, run.device)
    reads = [*(run.checkpoint / part for part in FROZEN), *goes_on]
    trained = run.trainer(painter, "diffusion", LEARNING_RATE, EMA_DECAY, reads).run(
        velocity_loss(painter, encoders, batches, first),
        batches,
        lambda averaged: sampler.sheet(averaged.unet, averaged.fusion, scheduler(), DEFAULTS),
    )
    save_part(trained.fusion, run.checkpoint / "fusion")
    save_part(trained.unet.half(), run.checkpoint / "unet")
    write_index(run.checkpoint, scheduler(), DEFAULTS, run.source)


def new_painter(run: Run) -> Painter:
    """Random, or as `run.init` has it.

    Raises:
        BadInput: `run.init` has no such parts, or of another shape.
    """
    painter = Painter(run.source.side)
    if run.init is not None:
        for part in ("fusion", "unet"):
            load_start(getattr(painter, part), run.init / part / SAFETENSORS_WEIGHTS_NAME, part)
    return painter


@torch.no_grad()
def latent_to_rgb(checkpoint: Path, source: data.Source = data.SCENES) -> list[list[float]]:
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
        "tokenizer_2": ["transformers", "BertTokenizer"],
        "text_encoder_2": ["transformers", "BertModel"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "fusion": ["networks.fusion_head", "FusionHead"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", type(noise_schedule).__name__],
    }
    (checkpoint / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
