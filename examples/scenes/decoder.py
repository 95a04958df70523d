"""Stage `decoder`: the VQGAN's decoder learns to draw what the UNet paints.

It was trained behind the encoder, whose codes are right. Served, latents come from the UNet, which
errs, and outlines become uneven; looking up the nearest codes turns an error into a code of
something else. Here true pictures are encoded and noised, the distilled UNet paints its last step
or two from there, and the decoder learns to draw the true picture from the result. A third of its
inputs stay the encoder's codes. Writes `vae/`, in which encoder and codebook stay, and its
configuration says that latents are not looked up.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor, nn

from examples.scenes.reward import nearest_codes
from export.vqgan_decoder import AS_PAINTED
from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.data import Batch, on_device
from training.diffusion import FROZEN, Encoders
from training.distill import (
    GUIDANCE,
    PHASE,
    alpha_sigma,
    check_distilled,
    ddim_scheduler,
    ddim_step,
    end_of_phase,
    scale_embedding,
)
from training.latents import encoded
from training.run import Run, save_part
from training.vqgan import SHOWN, compared
from training.vqgan_losses import psnr, reconstruction

STEPS, BATCH = 300, 32
PAINTED = 2  # of the UNet's steps at most: more would paint something else than the true picture
LEARNING_RATE, EMA_DECAY = 5e-4, 0.99


def train(run: Run) -> None:
    check_distilled(run.checkpoint)
    painter = LatentPainter(run.checkpoint, run.device)
    vae = painter.vae
    decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).requires_grad_(True)
    reads = [run.checkpoint / part for part in (*FROZEN, "fusion", "unet")]
    trainer = run.trainer(decoder, "decoder", LEARNING_RATE, EMA_DECAY, reads)
    first = run.first([run.checkpoint / "vae"])
    batches = run.source.batches(85_000_000 + first, run.batch, run.device)
    shown = on_device(run.source.sample(SHOWN, 8), run.device)
    painted = painter(shown, torch.Generator().manual_seed(SHOWN))

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        latents = painter(drawn, torch.Generator().manual_seed(first + step))
        y = decoder(latents).float()
        return {"loss": reconstruction(y, drawn.pictures), "psnr": psnr(y, drawn.pictures)}

    def samples(averaged: nn.Module) -> Image.Image:
        return compared(shown.pictures, averaged(painted))

    trained = cast(nn.Sequential, trainer.run(loss_at, batches, samples))
    vae.post_quant_conv, vae.decoder = trained
    vae.register_to_config(**{AS_PAINTED: True})
    save_part(vae, run.checkpoint / "vae")


class LatentPainter:
    """The encoder and the distilled UNet of a checkpoint, both frozen."""

    def __init__(self, checkpoint: Path, device: torch.device):
        self._encoders = Encoders(checkpoint, device)
        self._fusion = load_part(checkpoint / "fusion", FusionHead).to(device)
        self._unet = load_part(checkpoint / "unet", UNet2DConditionModel).to(device)
        self.vae = load_part(checkpoint / "vae", VQModel).to(device).requires_grad_(False)
        self._alphas_cumprod = ddim_scheduler().alphas_cumprod.to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """The decoder's inputs (B, C, h, w): a third are the encoder's codes.

        The others are noised to one or two steps before the end, and painted from there by the
        UNet, each with a guidance scale.
        """
        pictures, device = batch.pictures, batch.pictures.device
        with torch.autocast(device.type, enabled=False):
            x_t = encoded(self.vae, pictures)
        left = torch.arange(len(x_t), device=device) % (PAINTED + 1)
        noise = torch.randn(x_t.shape, generator=draw).to(device)
        scales = torch.empty(len(x_t)).uniform_(*GUIDANCE, generator=draw)
        alpha, sigma = alpha_sigma(left * PHASE - 1, self._alphas_cumprod)
        x_t = alpha * x_t + sigma * noise
        conditions = {
            "encoder_hidden_states": self._fusion(*self._encoders(batch.captions)),
            "timestep_cond": scale_embedding(scales).to(device),
        }
        for steps in range(PAINTED, 0, -1):
            going = left >= steps
            x_going, t = x_t[going], torch.full_like(left[going], steps * PHASE - 1)
            chosen = {name: tensor[going] for name, tensor in conditions.items()}
            v = self._unet(x_going, t, **chosen).sample.float()
            x_t[going] = ddim_step(x_going, v, t, end_of_phase(t), self._alphas_cumprod)
        unpainted = left == 0
        x_t[unpainted] = nearest_codes(self.vae, x_t[unpainted])
        return x_t / self.vae.config.scaling_factor
