"""The UNet: `sample` (B, C, h, w) at `timestep` (B) to `model_output` (B, C, h, w)."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, integers, normal
from export.sizes import native_size, side_multiple
from networks.loading import CheckpointError


class UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        dtype = self.unet.dtype
        if timestep_cond is not None:
            timestep_cond = timestep_cond.to(dtype)
        return self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states.to(dtype),
            timestep_cond=timestep_cond,
        ).sample.float()


def part(checkpoint: Checkpoint, fusion: Part) -> Part:
    """The UNet behind a fusion head that was loaded before.

    Raises:
        CheckpointError: its cross-attention is not as wide as the fused tokens, or it wants
            inputs that no prompt gives.
    """
    unet = checkpoint.load("unet", UNet2DConditionModel)
    channels, embedding = unet.config.in_channels, unet.config.time_cond_proj_dim
    _check_inputs(unet)
    hidden_axes = fusion.output[1].axes
    if unet.config.cross_attention_dim != hidden_axes[-1]:
        raise CheckpointError(
            f"unet has cross_attention_dim {unet.config.cross_attention_dim},"
            f" fusion has width {hidden_axes[-1]}"
        )
    latent = TensorSpec(torch.float32, (channels, "height", "width"))
    inputs = {
        "sample": latent,
        "timestep": TensorSpec(torch.float32, ()),
        "encoder_hidden_states": TensorSpec(torch.float32, hidden_axes),
    }
    if embedding:
        inputs["timestep_cond"] = TensorSpec(torch.float32, (embedding,))
    multiple = side_multiple(unet.config)

    def example(batch: int, size: int) -> dict[str, Tensor]:
        shape = (batch, channels, multiple * size, multiple * (size + 1))
        tensors = {
            "sample": normal(shape),
            "timestep": integers((batch,), 1000).float(),
            "encoder_hidden_states": normal((batch, *hidden_axes)),
        }
        if embedding:
            tensors["timestep_cond"] = normal((batch, embedding))
        return tensors

    return Part(
        "unet", UNet(unet), inputs, ("model_output", latent), example, side=native_size(checkpoint)
    )


def _check_inputs(unet: UNet2DConditionModel) -> None:
    config = unet.config
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(name) is not None:
            raise CheckpointError(f"unet has {name} {config[name]}: such inputs are not served")
    if config.in_channels != config.out_channels:
        raise CheckpointError(
            f"unet has in_channels {config.in_channels} and out_channels {config.out_channels}:"
            " only UNets that paint from noise alone are served"
        )
