"""Latents to train UNets on: how pictures are encoded, noised, and drawn in batches.

Knows nothing of captions' meaning and of the networks that read latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from networks.loading import load_part
from training import data
from training.run import Run

LATENT_CELL = 8  # pixels a side, of the VQGAN that `vqgan` trains
FIRST_DRAW = 60_000_000  # the seed of what the first step draws
CAPTION_DROP = 0.1  # share of captions replaced by "", for classifier-free guidance


class LatentBatch(NamedTuple):
    """What the UNet sees at a step.

    Attributes:
        latents: clean and scaled, (B, C, h, w).
        captions: one a picture.
        rng: a generator for what else the step draws.
        truth: what the source knows of each picture; empty if nothing.
    """

    latents: Tensor
    captions: list[str]
    rng: np.random.Generator
    truth: list[Any]

    def dropped(self) -> list[str]:
        """The captions, a share of `CAPTION_DROP` replaced by ""."""
        return ["" if self.rng.random() < CAPTION_DROP else text for text in self.captions]


class EncodedBatches:
    """Latents of batches of pictures, encoded as they come, and their captions.

    Batches without pictures have no latents.
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
        return LatentBatch(clean, drawn.captions, rng, drawn.truth)

    def report(self) -> str:
        return self._batches.report()

    def close(self) -> None:
        self._batches.close()


def latent_batches(run: Run, first: int) -> data.Batches:
    """`LatentBatch`es of a run's source, encoded once if the source can, else as they come.

    Pictures that are encoded as they come follow the order of the draws from `first`.
    """
    kept = run.source.latents(run.checkpoint, run.runs, run.batch, run.device)
    if kept is not None:
        return kept
    batches = run.source.batches(FIRST_DRAW + first, run.batch, run.device)
    vae = load_part(run.checkpoint / "vae", VQModel).to(run.device)
    return EncodedBatches(partial(encoded, vae), batches)


@torch.no_grad()
def encoded(vae: VQModel | AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents as the UNet knows them, (B, C, h, w), of pictures in [-1, 1], (B, 3, H, W)."""
    output = vae.encode(pictures)
    z = output.latents if isinstance(vae, VQModel) else output.latent_dist.mode()
    return (z - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def noised(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t at `alpha_bar` (B,)."""
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
