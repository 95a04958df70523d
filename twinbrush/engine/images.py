"""Pixels become files that carry how they were made, and latents become small previews.

Knows nothing of requests: what a file carries is a mapping that the caller makes.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, features

from twinbrush.engine import png

BLOCK = 64  # rows of pixels that are converted at a time
JSON_CHUNK = "twinbrush"  # the PNG text chunk with everything that `metadata` holds
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 92},
    "webp": {"quality": 90, "method": 2},
    "avif": {"quality": 85, "speed": 8},
}
_FILES = ("png", *(f for f in _SAVE_OPTIONS if f == "jpeg" or features.check(f)))
_BASE64 = "_base64"
IMAGE_FORMATS = (*_FILES, "raw", *(f"{name}{_BASE64}" for name in (*_FILES, "raw")))
_LABELS = {  # of A1111's `parameters` text, in its order
    "steps": "Steps",
    "sampler": "Sampler",
    "sigma_schedule": "Schedule type",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "checkpoint_hash": "Model hash",
    "checkpoint": "Model",
    "version": "Version",
}


def check_finite(numbers: np.ndarray | float) -> None:
    """Raises ValueError where a number of a picture is not finite."""
    if not np.isfinite(numbers).all():
        raise ValueError("the picture has numbers that are not finite")


def to_pixels(image: np.ndarray) -> np.ndarray:
    """A picture (3, H, W) in [-1, 1] as uint8 (H, W, 3).

    Raises:
        ValueError: a number is not finite, as where FP16 is too narrow for a network.
    """
    pixels = np.empty((*image.shape[1:], 3), np.uint8)
    scratch = np.empty((BLOCK, image.shape[2]), image.dtype)
    for top in range(0, len(pixels), BLOCK):  # whose temporaries stay in a core's cache
        for channel, plane in enumerate(image[:, top : top + BLOCK]):
            check_finite(plane)
            scaled = np.maximum(plane, -1, out=scratch[: len(plane)])
            np.minimum(scaled, 1, out=scaled)
            scaled += 1
            scaled *= 127.5
            pixels[top : top + BLOCK, :, channel] = np.rint(scaled, out=scaled)
    return pixels


def encode(
    pixels: np.ndarray,
    image_format: str,
    metadata: Mapping[str, Any] | None = None,
    quality: int | None = None,
) -> bytes:
    """uint8 (H, W, 3) in one of `IMAGE_FORMATS`; `raw` is RGB rows from the top.

    `quality`, 1 to 100, is of the formats that have one; None takes the format's own.
    `metadata` (prompt, negative_prompt, seed, steps, sampler, …; values of JSON) goes into the
    file: PNG gets A1111's `parameters` text and a JSON chunk, the others the same as EXIF's
    UserComment and MakerNote. `raw` carries none.
    """
    name = image_format.removesuffix(_BASE64)
    if name == "raw":
        data = pixels.tobytes()
    elif name == "png":
        data = png.encode(pixels, _png_info(metadata) if metadata else None)
    else:
        options = _SAVE_OPTIONS[name] | ({"exif": _exif(metadata)} if metadata else {})
        if quality is not None and "quality" in options:
            options["quality"] = quality
        data = _saved(Image.fromarray(pixels), name, options)
    return base64.b64encode(data) if name != image_format else data


def _saved(image: Image.Image, name: str, options: Mapping[str, Any]) -> bytes:
    """The file that Pillow writes.

    Through a descriptor, because only there does its JPEG encoder let other threads run.
    """
    with os.fdopen(os.memfd_create("image"), "w+b") as file:
        image.save(file, name, **options)
        file.seek(0)
        return file.read()


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The text that A1111's web UI writes into its images, and other tools read."""
    lines = [str(metadata.get("prompt", ""))]
    if negative := metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {negative}")
    values = dict(metadata)
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    pairs = ((label, values.get(name)) for name, label in _LABELS.items())
    lines.append(", ".join(f"{label}: {_quoted(v)}" for label, v in pairs if v not in (None, "")))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """As A1111 does: a text that would break the list of pairs is a JSON string."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if {",", ":", "\n"} & set(text) else text


def _png_info(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters_text(metadata))
    info.add_itxt(JSON_CHUNK, _everything(metadata))
    return info


def _exif(metadata: Mapping[str, Any]) -> bytes:
    text = parameters_text(metadata).encode("utf-16-be")
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif).update({
        ExifTags.Base.UserComment: b"UNICODE\0" + text,
        ExifTags.Base.MakerNote: _everything(metadata).encode(),
    })  # fmt: skip
    return exif.tobytes()


def _everything(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False)


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
