"""Pixels become bytes, and latents become small previews."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def to_pixels(image: np.ndarray) -> np.ndarray:
    """A picture (3, H, W) in [-1, 1] as uint8 (H, W, 3).

    Raises:
        ValueError: a number is not finite, as where FP16 is too narrow for a network.
    """
    if not np.isfinite(image).all():
        raise ValueError("the picture has numbers that are not finite")
    scaled = np.rint((np.clip(image, -1, 1) + 1) * 127.5)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))


def encode(pixels: np.ndarray, image_format: str) -> bytes:
    """uint8 (H, W, 3) as `png`, `jpeg`, `raw` (RGB rows from the top) or `png_base64`."""
    if image_format == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    if image_format == "jpeg":
        Image.fromarray(pixels).save(buffer, "jpeg", quality=92)
    else:
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    data = buffer.getvalue()
    return base64.b64encode(data) if image_format == "png_base64" else data


def preview(latent: np.ndarray, latent_to_rgb: np.ndarray) -> np.ndarray:
    """A cheap look at a latent (C, h, w): uint8 (h, w, 3), one pixel a latent cell.

    `latent_to_rgb` is (9·C + 1, 3): a linear map of the 3×3 cells around each cell, channel by
    channel and row by row, and last its offset.
    """
    padded = np.pad(latent, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (1, 3, 3))[:, :, :, 0]
    weights = latent_to_rgb[:-1].reshape(len(latent), 3, 3, 3)
    return to_pixels(
        np.einsum("chwij,cijr->rhw", around, weights) + latent_to_rgb[-1][:, None, None]
    )
