"""The request fields of the server.

Written by `python -m twinbrush.engine.field_tables`: do not edit.
"""

from __future__ import annotations

from typing import TypedDict

# Triton's data type of each field.
DATA_TYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "seed": "INT64",
    "steps": "INT32",
    "guidance_scale": "FP32",
    "width": "INT32",
    "height": "INT32",
    "sampler": "BYTES",
    "num_images": "INT32",
    "image_format": "BYTES",
    "deterministic": "BOOL",
    "progress": "BOOL",
    "preview_every": "INT32",
}

HELP = {
    "prompt": (
        "What to paint. A prompt longer than an encoder's limit is truncated; the response's "
        "warning says so."
    ),
    "negative_prompt": "What guidance leads away from.",
    "seed": "Image k is drawn from seed + k. Always returned.",
    "steps": "Denoising steps.",
    "guidance_scale": "How closely to follow the prompt; 1 is no guidance.",
    "width": "Width in pixels.",
    "height": "Height in pixels.",
    "sampler": "How latents go from one step to the next.",
    "num_images": "Number of images.",
    "image_format": (
        "File format. The default is valid in JSON; over gRPC, formats without _base64 save a "
        "quarter of the bytes, and the Python client sends png. raw is RGB rows from the top."
    ),
    "deterministic": (
        "Same bytes however busy the server is; the request's UNet calls are not shared."
    ),
    "progress": "Send a progress event for every step.",
    "preview_every": "Send a preview, one pixel a latent cell, every so many steps; 0 sends none.",
}

ALLOWED = {
    "prompt": "1 to 2000 characters",
    "negative_prompt": "up to 2000 characters",
    "seed": "0 to 2⁶³−1",
    "steps": "1 to 50",
    "guidance_scale": "0 to 50",
    "width": "multiples of the checkpoint's grid, up to four times its native side and 2,048",
    "height": "multiples of the checkpoint's grid, up to four times its native side and 2,048",
    "sampler": "lcm, ddim, euler, dpmpp_2m",
    "num_images": "1 to 16",
    "image_format": (
        "png, jpeg, webp, avif, raw, png_base64, jpeg_base64, webp_base64, avif_base64, "
        "raw_base64"
    ),
    "deterministic": "true, false",
    "progress": "true, false",
    "preview_every": "0 to 50",
}

STREAM_ONLY = ("progress", "preview_every")


class RequestFields(TypedDict, total=False):
    """Keyword arguments of a request besides the prompt; None takes the default."""

    negative_prompt: str | None
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    width: int | None
    height: int | None
    sampler: str | None
    num_images: int | None
    image_format: str | None
    deterministic: bool | None
    progress: bool | None
    preview_every: int | None
    num_inference_steps: int | None
    num_images_per_prompt: int | None
