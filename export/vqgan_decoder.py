"""The decoder: `latent` (B, C, h, w), as the UNet leaves it, to `image` (B, 3, H, W).

Its file also gives `pixels`, which are served.

A `VQModel` looks its codes up first, unless `_force_not_quantize` in its configuration says that
its decoder was trained on latents as they are painted; `AutoencoderKL` and
`AutoencoderTiny` have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import VQModel
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, normal
from export.pixels import OUTPUTS
from export.sizes import native_size
from networks.loading import CheckpointError
from networks.preview import fit_preview

UNUSED = ("encoder.", "quant_conv.")  # tensors of the way in
AS_PAINTED = "_force_not_quantize"  # named as in `VQModel.decode`; diffusers keeps what begins so

Factor = float | tuple[float, ...]


class Decoder(nn.Module):
    """Undoes the scaling of latents as diffusers' pipelines do, then decodes.

    A factor is one number, or one a channel.
    """

    def __init__(self, vae: nn.Module, scaling_factor: Factor, shift_factor: Factor):
        super().__init__()
        self.vae, self.scaling_factor, self.shift_factor = vae, scaling_factor, shift_factor
        self.looks_up = isinstance(vae, VQModel) and not vae.config.get(AS_PAINTED)

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent / _factor(self.scaling_factor) + _factor(self.shift_factor)
        if not isinstance(self.vae, VQModel):
            return self.vae.decode(latent.to(self.vae.dtype)).sample.float()
        if self.looks_up:
            latent = self.vae.quantize(latent)[0]
        latent = latent.to(self.vae.post_quant_conv.weight.dtype)
        return self.vae.decode(latent, force_not_quantize=True).sample.float()


def part(checkpoint: Checkpoint, latent_channels: int) -> Part:
    """The decoder of what a UNet of `latent_channels` paints.

    Raises:
        CheckpointError: it takes another number of channels.
    """
    vae_class = getattr(diffusers, checkpoint.classes["vae"])
    vae = checkpoint.load("vae", vae_class, unused=UNUSED)
    vae.encoder = vae.quant_conv = None  # pictures never go in
    # What a VQModel looks up, and so its latents, may be narrower than its convolutions.
    channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    if channels != latent_channels:
        text = f"vae decodes latents of {channels} channels, unet paints {latent_channels}"
        raise CheckpointError(text)
    decoder = Decoder(vae, *_scaling(vae.config))
    if isinstance(vae, VQModel) and not decoder.looks_up:
        vae.quantize = None
    return Part(
        name="vqgan_decoder",
        module=decoder,
        inputs={"latent": TensorSpec(torch.float32, (channels, "height", "width"))},
        outputs={"image": TensorSpec(torch.float32, (3, "image_height", "image_width"))},
        example=lambda batch, size: {"latent": normal((batch, channels, 4 * size, 4 * size + 4))},
        full_precision=_full_precision(checkpoint, decoder),
        side=native_size(checkpoint),
        served=OUTPUTS,
    )


def _full_precision(checkpoint: Checkpoint, decoder: Decoder) -> tuple[nn.Module, ...]:
    """Modules that FP16 breaks."""
    if decoder.looks_up:
        return (decoder.vae.quantize,)  # rounded, a codebook has other nearest codes
    # SDXL's autoencoder overflows in FP16; diffusers reads the setting in SDXL's pipeline alone.
    if "text_encoder_2" in checkpoint.folders and decoder.vae.config.get("force_upcast"):
        return (decoder.vae,)
    return ()


def _scaling(config: Mapping[str, Any]) -> tuple[Factor, Factor]:
    """What latents are divided by and shifted by; as `latents_mean` and `latents_std` say."""
    scaling, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scaling, shift
    return tuple(scaling / deviation for deviation in std), tuple(map(float, mean))


def _factor(value: Factor) -> float | Tensor:
    return torch.tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else value


@torch.no_grad()
def latent_to_rgb(decoder: Part) -> list[list[float]]:
    """The map of previews, fitted on what smooth random latents decode to."""
    channels = decoder.inputs["latent"].axes[0]
    smooth = [
        nn.functional.interpolate(normal((16, channels, side, side)), size=(8, 8))
        for side in (1, 2, 4, 8)
    ]
    latents = torch.cat(smooth)
    return fit_preview(latents, decoder.module(latents).clamp(-1, 1))
