"""The UNet: `sample` (B, C, h, w) at `timestep` (B) to `model_output` (B, C, h, w).

The text tokens (B, T, D) are those of one chunk of text or of a few. Besides them the UNet takes
what its family adds: `timestep_cond` (B, E) of distilled UNets, and SDXL's `text_embeds` (B, Dp)
and `time_ids` (B, 6).
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from export.checkpoint import Checkpoint
from export.lora_set import LoraScales, attach_loras, with_scales
from export.part import Part, TensorSpec, integers, normal
from export.sizes import native_size, side_multiple
from networks.loading import CheckpointError
from twinbrush.engine.config import TOKENS

MAX_CHUNKS = 8  # of a prompt
TIME_IDS = 6  # original height and width, top and left of the crop, target height and width


class UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, scales: LoraScales | None = None):
        super().__init__()
        self.unet, self.scales = unet, scales or LoraScales(0)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        lora_scale: Tensor | None = None,
    ) -> Tensor:
        with self.scales.of(lora_scale):
            return _predict(self.unet, sample, timestep, encoder_hidden_states, timestep_cond)


class UNetXL(nn.Module):
    """A UNet with SDXL's pooled text and sizes beside the tokens."""

    def __init__(self, unet: UNet2DConditionModel, scales: LoraScales | None = None):
        super().__init__()
        self.unet, self.scales = unet, scales or LoraScales(0)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
        lora_scale: Tensor | None = None,
    ) -> Tensor:
        # In FP32, as the embedded sizes that diffusers joins them with: ONNX joins one type alone.
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        with self.scales.of(lora_scale):
            return _predict(
                self.unet, sample, timestep, encoder_hidden_states, timestep_cond, added
            )


def _predict(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    timestep_cond: Tensor | None,
    added: dict[str, Tensor] | None = None,
) -> Tensor:
    """The UNet's prediction in FP32, whatever the precision of its weights."""
    return unet(
        sample.to(unet.dtype),
        timestep,
        encoder_hidden_states.to(unet.dtype),
        timestep_cond=None if timestep_cond is None else timestep_cond.to(unet.dtype),
        added_cond_kwargs=added,
    ).sample.float()


class UpcastAttention:
    """Attention whose logits are computed in FP32, as `upcast_attention` asks for.

    Diffusers' own fused attention ignores the setting; in FP16 such logits overflow.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:  # fmt: skip
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = hidden_states.shape
        query, key, value = (
            projected.view(batch, -1, attn.heads, projected.shape[-1] // attn.heads)
            .transpose(1, 2)
            .float()
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed = scaled_dot_product_attention(query, key, value, scale=attn.scale)
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1).to(hidden_states.dtype)
        return attn.to_out[0](mixed)


def part(checkpoint: Checkpoint, fusion: Part, pooled: TensorSpec | None = None) -> Part:
    """The UNet behind a fusion head that was loaded before.

    Args:
        checkpoint: that the UNet is from.
        fusion: the loaded head.
        pooled: the encoders' `text_embeds`, where there is a second tower.

    Raises:
        CheckpointError: it does not fit the encoders, or requires inputs that no prompt gives.
    """
    unet = checkpoint.load("unet", UNet2DConditionModel)
    check_inputs(unet.config, pooled.axes[0] if pooled else None)
    hidden = fusion.outputs["encoder_hidden_states"]
    check_width(unet.config, hidden.axes[-1])
    for module in unet.modules():
        if isinstance(module, Attention) and module.upcast_attention and not module.group_norm:
            module.set_processor(UpcastAttention())
    latent = TensorSpec(torch.float32, (unet.config.in_channels, "height", "width"))
    length, width = hidden.axes
    inputs = {
        "sample": latent,
        "timestep": TensorSpec(torch.float32, ()),
        TOKENS: TensorSpec(torch.float32, ("tokens", width)),
    }
    if unet.config.addition_embed_type:
        inputs |= {"text_embeds": pooled, "time_ids": TensorSpec(torch.float32, (TIME_IDS,))}
    if unet.config.time_cond_proj_dim:
        inputs["timestep_cond"] = TensorSpec(torch.float32, (unet.config.time_cond_proj_dim,))
    multiple = side_multiple(unet.config)

    def example(batch: int, size: int) -> dict[str, Tensor]:
        chunks = 1 + size % 2  # so that sizes 2 and 3 try both
        sides = {"height": multiple * size, "width": multiple * (size + 1)}
        sides["tokens"] = chunks * length
        tensors = {
            name: normal((batch, *(sides.get(axis, axis) for axis in spec.axes)))
            for name, spec in inputs.items()
        }
        tensors["timestep"] = integers((batch,), 1000).float()
        if "time_ids" in tensors:
            tensors["time_ids"] = integers((batch, TIME_IDS), 1024).float()
        return tensors

    scales = attach_loras(unet, "unet", checkpoint.serving.lora_set)
    wrapped = (UNetXL if "time_ids" in inputs else UNet)(unet, scales)
    side = native_size(checkpoint)
    outputs = {"model_output": latent}
    plain = Part("unet", wrapped, inputs, outputs, example, side=side, tokens=length)
    return with_scales(plain, scales)


def check_inputs(config, pooled: int | None) -> None:
    """Checks that a UNet's configuration requires only inputs that a prompt gives.

    Args:
        config: of the UNet.
        pooled: width of `text_embeds`, or None without a second tower.

    Raises:
        CheckpointError: it names the field.
    """
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
        if config.get(name) is not None:
            raise CheckpointError(f"unet has {name} {config[name]}: such inputs are not served")
    if config.get("dual_cross_attention"):
        raise CheckpointError("unet has dual_cross_attention: such inputs are not served")
    if config.get("attention_type", "default") != "default":
        text = f"unet has attention_type {config['attention_type']}: such inputs are not served"
        raise CheckpointError(text)
    added = config.get("addition_embed_type")
    if added not in (None, "text_time") or (added and pooled is None):
        text = f"unet has addition_embed_type {added}: such inputs are not served"
        raise CheckpointError(f"{text} without SDXL's text_encoder_2" if pooled is None else text)
    if added is None and pooled is not None:
        text = "unet has addition_embed_type None, and the checkpoint has a text_encoder_2"
        raise CheckpointError(f"{text}: with two towers it must be text_time")
    if added:
        width = pooled + TIME_IDS * (config.get("addition_time_embed_dim") or 0)
        if config.get("projection_class_embeddings_input_dim") != width:
            raise CheckpointError(
                "unet has projection_class_embeddings_input_dim"
                f" {config.get('projection_class_embeddings_input_dim')}, text_encoder_2 and"
                f" time_ids have {width}"
            )
    channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels[0] != channels[1]:
        raise CheckpointError(
            f"unet has in_channels {channels[0]} and out_channels {channels[1]}:"
            " only UNets that paint from noise alone are served"
        )


def check_width(config, width: int, source: str = "fusion has width") -> None:
    """Raises CheckpointError where a cross-attention is not as wide as the tokens."""
    given = config.get("cross_attention_dim", 1280)
    widths = set(given) if isinstance(given, list | tuple) else {given}
    if widths != {width}:
        raise CheckpointError(f"unet has cross_attention_dim {given}, {source} {width}")
