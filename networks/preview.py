"""The linear map that previews are made with, fitted by ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.1  # standard deviation of what unfinished latents are off by; the fit allows for it


def fit_preview(latents: Tensor, pictures: Tensor) -> list[list[float]]:
    """From the 3×3 cells around a latent cell to the mean colour of the cell's pixels.

    Args:
        latents: as the UNet leaves them, (B, C, h, w).
        pictures: what they decode to or were encoded from, (B, 3, H, W) in [-1, 1].

    Returns:
        (9·C + 1, 3): weights, channel by channel and row by row, then the offset.
    """
    height, width = latents.shape[-2:]
    around = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3)  # (B, 9·C, h·w)
    known = around.transpose(1, 2).flatten(0, 1)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    cells = F.adaptive_avg_pool2d(pictures, (height, width)).flatten(2).transpose(1, 2)
    known, cells = known.double(), cells.flatten(0, 1).double()
    gram = known.T @ known
    gram.diagonal()[:-1] += len(known) * NOISE**2
    return torch.linalg.solve(gram, known.T @ cells).round(decimals=6).tolist()
