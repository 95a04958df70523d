"""Sizes of latents and pictures, from the configurations of a checkpoint. Knows no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from export.checkpoint import Checkpoint
from networks.loading import CheckpointError

MAX_CELLS = 4096  # a side; a larger one is no size that a network was trained on
FORMER_SIDE = 64  # of UNets whose files are of `FORMER`, and name a smaller one
FORMER = re.compile(r"0\.[0-8](\.|$)")  # versions of diffusers


def native_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the latents that the UNet was trained on, in cells.

    Where its configuration is silent, the pictures of the autoencoder decide. Files of Stable
    Diffusion that precede diffusers 0.9 name too small a side, which its pipeline corrects too.

    Raises:
        CheckpointError: no configuration has a size, or not one that the UNet can take.
    """
    unet, part, divisor = checkpoint.config("unet"), "unet", 1
    given = unet.get("sample_size")
    if given is None:
        given, part, divisor = checkpoint.config("vae").get("sample_size"), "vae", None
    elif type(given) is int and 0 < given < FORMER_SIDE and _is_former(checkpoint, unet):
        given = FORMER_SIDE
    file = f"{checkpoint.folders[part]}/config.json"
    if given is None:
        unet_file = f"{checkpoint.folders['unet']}/config.json"
        raise CheckpointError(
            f"{unet_file} has no sample_size: add the side of the latents that the UNet was"
            " trained on, as 64, or [height, width]"
        )
    sides = given if isinstance(given, list) else [given, given]
    whole = all(type(side) is int and 0 < side <= MAX_CELLS for side in sides)
    if len(sides) != 2 or not whole:
        text = f"{file}: sample_size={given!r} is invalid"
        raise CheckpointError(f"{text}: must be a whole number above 0, or [height, width]")
    cell, multiple = divisor or scale_factor(checkpoint), side_multiple(unet)
    height, width = (side // cell for side in sides)
    if any(side < multiple or side % multiple for side in (height, width)):
        text = f"{file}: sample_size={given!r} is invalid"
        raise CheckpointError(f"{text}: latent sides must be multiples of {multiple}")
    return height, width


def _is_former(checkpoint: Checkpoint, unet: Mapping[str, Any]) -> bool:
    plain = checkpoint.index.get("_class_name") == "StableDiffusionPipeline"
    return plain and FORMER.match(str(unet.get("_diffusers_version"))) is not None


def side_multiple(unet: Mapping[str, Any]) -> int:
    """Latent sides must be multiples of this, or the skip connections would not meet."""
    return 2 ** (len(unet.get("block_out_channels", (1, 1, 1, 1))) - 1)


def scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels a latent cell, each way."""
    config = checkpoint.config("vae")
    if checkpoint.classes["vae"] == "AutoencoderTiny":
        return 2 ** (len(config.get("decoder_block_out_channels", (1, 1, 1, 1))) - 1)
    return 2 ** (len(config.get("block_out_channels", (1,))) - 1)
