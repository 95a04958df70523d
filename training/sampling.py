"""Samples of the UNet in training: a few fixed prompts, always from the same noise.

It samples with diffusers' schedulers; how a checkpoint is served is the engine's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor

from networks.fusion_head import FusionHead
from networks.loading import load_part
from training.data import Source
from training.sheets import grid
from twinbrush.engine.guidance import guidance_embedding

COLUMNS, COUNT = 4, 8
SEED = 58_999_999  # of the prompts


class ReadsText(Protocol):
    """Texts to what the fusion head takes."""

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]: ...


class Sampler:
    """Paints the same prompts of a source from the same noise with any UNet."""

    def __init__(self, checkpoint: Path, encoders: ReadsText, source: Source, device: torch.device):
        self._vae = load_part(checkpoint / "vae", VQModel).to(device)
        self._captions = source.sample(SEED, COUNT).captions
        self._conditions = encoders(self._captions)
        self._empty = encoders([""])

    @torch.no_grad()
    def sheet(
        self,
        unet: UNet2DConditionModel,
        fusion: FusionHead,
        schedule: SchedulerMixin,
        defaults: dict[str, float],
    ) -> Image.Image:
        """A grid of the prompts, sampled with `defaults`' `steps` and `guidance_scale`."""
        hidden = fusion(*self._conditions)
        empty = fusion(*self._empty)
        draw = torch.Generator().manual_seed(0)
        latents = sample(unet, hidden, empty, schedule, defaults, draw)
        decoded = self._vae.decode(latents / self._vae.config.scaling_factor).sample
        return grid(decoded, COLUMNS, self._captions)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    hidden: Tensor,
    empty: Tensor,
    schedule: SchedulerMixin,
    defaults: dict[str, float],
    draw: torch.Generator,
) -> Tensor:
    """Latents (B, C, h, w) from noise.

    Args:
        hidden: conditioning of the prompts, (B, L, D); `empty` is that of no prompt, (1, L, D).
        defaults: `steps` and `guidance_scale`; a UNet with `time_cond_proj_dim` takes the scale
            as an embedding, another is guided in two rows.
    """
    scale, width = defaults["guidance_scale"], unet.config.time_cond_proj_dim
    shape = (len(hidden), unet.config.in_channels, *(unet.config.sample_size,) * 2)
    x_t = torch.randn(shape, generator=draw)
    schedule.set_timesteps(int(defaults["steps"]))
    for t in schedule.timesteps:
        x = x_t.to(hidden.device)
        if width:
            embedding = torch.from_numpy(guidance_embedding(scale, width)).to(x.device)
            embedding = embedding.expand(len(x), -1)
            out = unet(x, t, encoder_hidden_states=hidden, timestep_cond=embedding).sample
        else:
            led = torch.cat([empty.expand_as(hidden), hidden])
            out = unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=led).sample
            without, with_prompt = out.chunk(2)
            out = without + scale * (with_prompt - without)
        x_t = schedule.step(out.cpu().float(), t, x_t, generator=draw).prev_sample
    return x_t.to(hidden.device)
