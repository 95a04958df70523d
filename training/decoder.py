"""`python -m training.decoder`: the VQGAN's decoder learns to draw what the UNet leaves.

A UNet ends near the latents of a picture, not on them, and a decoder that only knows those of true
pictures shows it: circles get corners. Here half of the latents are noised as they are where the
student's last step begins, and the student takes that step; the decoder learns to draw the true
picture all the same. The others are the encoder's. The losses are those that `training.vqgan` ends
with; encoder and codebook stay as they are. Writes `vae/`.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor

from export.checkpoint import load_part
from export.fusion_head import FusionHead
from training.align import check_distilled, timesteps
from training.cli import stage_cli
from training.diffusion import FROZEN, Encoders, noised
from training.distill import GUIDANCE, ddim_scheduler, ddim_step, end_of_phase, scale_embedding
from training.run import Run, check_trained, save_part
from training.vqgan import Weights, sharpen

STEPS, BATCH = 300, 32


def train(run: Run) -> None:
    check_trained(run.checkpoint, *FROZEN, "image_encoder", "fusion", "unet")
    check_distilled(run.checkpoint)
    device, encoders = run.device, Encoders(run.checkpoint, run.device)
    fusion = load_part(run.checkpoint / "fusion", FusionHead).to(device)
    unet = load_part(run.checkpoint / "unet", UNet2DConditionModel).to(device)
    vae = load_part(run.checkpoint / "vae", VQModel)
    alphas_cumprod = ddim_scheduler().alphas_cumprod.to(device)
    last, scaling = timesteps(device)[-1:], vae.config["scaling_factor"]

    @torch.no_grad()
    def left(latents: Tensor, captions: list[str], step: int) -> Tensor:
        n, (low, high) = (len(latents) + 1) // 2, GUIDANCE
        draw = torch.Generator().manual_seed(step)
        x0 = scaling * latents[:n].float()
        noise = torch.randn(x0.shape, generator=draw).to(device)
        scales = low + (high - low) * torch.rand(n, generator=draw)
        t = last.expand(n)
        x_t = noised(x0, noise, alphas_cumprod[t])
        v = unet(
            x_t,
            t,
            encoder_hidden_states=fusion(*encoders(captions[:n])),
            timestep_cond=scale_embedding(scales).to(device),
        ).sample.float()
        x_end = ddim_step(x_t, v, t, end_of_phase(t), alphas_cumprod)
        return torch.cat([x_end / scaling, latents[n:]])

    reads = [run.checkpoint / part for part in (*FROZEN, "fusion", "unet")]
    sharpen(vae, Weights(), run, "decoder", reads, left)
    save_part(vae, run.checkpoint / "vae")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
