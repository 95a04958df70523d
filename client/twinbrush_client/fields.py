"""The request fields of the server.

Written by `python -m twinbrush.engine.field_tables`: do not edit.
"""

from __future__ import annotations

from typing import TypedDict

# Triton's data type of each field.
DATA_TYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "prompt_syntax": "BYTES",
    "lora": "BYTES",
    "seed": "INT64",
    "steps": "INT32",
    "guidance_scale": "FP32",
    "width": "INT32",
    "height": "INT32",
    "sampler": "BYTES",
    "sigma_schedule": "BYTES",
    "eta": "FP32",
    "guidance_rescale": "FP32",
    "guidance_start": "FP32",
    "guidance_end": "FP32",
    "original_size": "INT32",
    "crop_top_left": "INT32",
    "target_size": "INT32",
    "num_images": "INT32",
    "image_format": "BYTES",
    "image_quality": "INT32",
    "deterministic": "BOOL",
    "metadata": "BOOL",
    "priority": "BYTES",
    "deadline_ms": "INT32",
    "client": "BYTES",
    "progress": "BOOL",
    "preview_every": "INT32",
}

HELP = {
    "prompt": (
        "What to paint. A prompt longer than an encoder's limit is truncated; the response's "
        "warning says so."
    ),
    "negative_prompt": "What guidance leads away from.",
    "prompt_syntax": (
        "How both prompts are read: a1111 takes weights as (word:1.2) and [word], BREAK, and "
        "prompts of several chunks of tokens."
    ),
    "lora": (
        "LoRAs that the server's checkpoint was exported with, and their scales: ink:0.8,film. "
        "info lists them."
    ),
    "seed": "Image k is drawn from seed + k. Always returned.",
    "steps": "Denoising steps.",
    "guidance_scale": "How closely to follow the prompt; 1 is no guidance.",
    "width": "Width in pixels.",
    "height": "Height in pixels.",
    "sampler": "How latents go from one step to the next.",
    "sigma_schedule": (
        "How the noise levels of the steps are spaced; the default is the checkpoint's own."
    ),
    "eta": "Share of fresh noise in each step, of ddim and tcd alone.",
    "guidance_rescale": (
        "How far guided predictions are brought back to the contrast of unguided ones."
    ),
    "guidance_start": "Share of the steps after which guidance begins.",
    "guidance_end": "Share of the steps after which guidance ends.",
    "original_size": (
        "Height and width before training's resizing that the picture looks as if it had."
    ),
    "crop_top_left": "Top and left of the crop that the picture looks as if it were.",
    "target_size": "Height and width that the picture looks as if it were trained at.",
    "num_images": "Number of images.",
    "image_format": (
        "File format. The default is valid in JSON; over gRPC, formats without _base64 save a "
        "quarter of the bytes, and the Python client sends png. raw is RGB rows from the top."
    ),
    "image_quality": "Quality of jpeg, webp and avif files; other formats lose nothing.",
    "deterministic": (
        "Same bytes however busy the server is; the request's UNet calls are not shared."
    ),
    "metadata": "Write prompt, seed and settings into the image file.",
    "priority": "Weight among the live requests; no priority starves another.",
    "deadline_ms": (
        "Milliseconds after which the request is ended with DEADLINE_EXCEEDED; 0 sets none."
    ),
    "client": (
        "Who asks. The live requests of one client have at most a share of the queue; those "
        "without a name are not counted together."
    ),
    "progress": "Send a progress event for every step.",
    "preview_every": "Send a preview, one pixel a latent cell, every so many steps; 0 sends none.",
}

ALLOWED = {
    "prompt": "1 to 2000 characters",
    "negative_prompt": "up to 2000 characters",
    "prompt_syntax": "plain, a1111",
    "lora": "NAME:SCALE, with commas; scales of -10 to 10",
    "seed": "0 to 2⁶³−1",
    "steps": "1 to 50",
    "guidance_scale": "0 to 50",
    "width": "multiples of the checkpoint's grid, up to four times its native side and 2,048",
    "height": "multiples of the checkpoint's grid, up to four times its native side and 2,048",
    "sampler": (
        "lcm, ddim, euler, dpmpp_2m, ddpm, euler_a, heun, lms, dpmpp_2m_sde, unipc, deis, pndm, tcd"
    ),
    "sigma_schedule": "default, normal, karras, exponential, beta, sgm_uniform",
    "eta": "0 to 1",
    "guidance_rescale": "0 to 1",
    "guidance_start": "0 to 1",
    "guidance_end": "0 to 1",
    "original_size": "two of 1 to 1048576; of SDXL alone",
    "crop_top_left": "two of 0 to 1048576; of SDXL alone",
    "target_size": "two of 1 to 1048576; of SDXL alone",
    "num_images": "1 to 16",
    "image_format": (
        "png, jpeg, webp, avif, raw, png_base64, jpeg_base64, webp_base64, avif_base64, raw_base64"
    ),
    "image_quality": "1 to 100",
    "deterministic": "true, false",
    "metadata": "true, false",
    "priority": "low, normal, high",
    "deadline_ms": "0 to 86400000",
    "client": "up to 64 characters",
    "progress": "true, false",
    "preview_every": "0 to 50",
}

# Elements of the fields that have several.
COUNTS = {
    "original_size": 2,
    "crop_top_left": 2,
    "target_size": 2,
}

STREAM_ONLY = ("progress", "preview_every")


class RequestFields(TypedDict, total=False):
    """Keyword arguments of a request besides the prompt; None takes the default."""

    negative_prompt: str | None
    prompt_syntax: str | None
    lora: str | None
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    width: int | None
    height: int | None
    sampler: str | None
    sigma_schedule: str | None
    eta: float | None
    guidance_rescale: float | None
    guidance_start: float | None
    guidance_end: float | None
    original_size: tuple[int, int] | None
    crop_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    num_images: int | None
    image_format: str | None
    image_quality: int | None
    deterministic: bool | None
    metadata: bool | None
    priority: str | None
    deadline_ms: int | None
    client: str | None
    progress: bool | None
    preview_every: int | None
    num_inference_steps: int | None
    num_images_per_prompt: int | None
