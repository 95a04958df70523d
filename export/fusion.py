"""The fusion head: CLIP and BERT tokens to `encoder_hidden_states` (B, L, D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, normal, padding_mask
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError


class Fusion(nn.Module):
    def __init__(self, head: FusionHead):
        super().__init__()
        self.head = head

    def forward(self, clip_tokens: Tensor, bert_tokens: Tensor, attention_mask: Tensor) -> Tensor:
        dtype = self.head.dtype
        return self.head(clip_tokens.to(dtype), bert_tokens.to(dtype), attention_mask).float()


def part(checkpoint: Checkpoint, clip: Part, bert: Part) -> Part:
    """The head between two parts that were loaded before; a new one where there is none.

    Raises:
        CheckpointError: its widths are not those of the encoders.
    """
    clip_axes, bert_axes = clip.output[1].axes, bert.output[1].axes
    if "fusion" in checkpoint.folders:
        head = checkpoint.load("fusion", FusionHead)
    else:
        head = new_head(clip_axes[-1], bert_axes[-1], bert.module.layers)
    for name, width, axes in (
        ("width", head.config.width, clip_axes),
        ("bert_width", head.config.bert_width, bert_axes),
    ):
        if width != axes[-1]:
            raise CheckpointError(f"fusion has {name} {width}, its encoder has {axes[-1]}")
    mask_axes = bert.inputs["attention_mask"].axes
    return Part(
        name="fusion",
        module=Fusion(head),
        inputs={
            "clip_tokens": TensorSpec(torch.float32, clip_axes),
            "bert_tokens": TensorSpec(torch.float32, bert_axes),
            "attention_mask": TensorSpec(torch.int64, mask_axes),
        },
        output=("encoder_hidden_states", TensorSpec(torch.float32, clip_axes)),
        example=lambda batch, size: {
            "clip_tokens": normal((batch, *clip_axes)),
            "bert_tokens": normal((batch, *bert_axes)),
            "attention_mask": padding_mask(batch, mask_axes[0]),
        },
    )


def new_head(width: int, bert_width: int, bert_layers: list[int]) -> FusionHead:
    """A head that gives CLIP's tokens back unchanged, ready to be trained."""
    heads = max(count for count in range(1, 17) if width % count == 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusionHead(width, bert_width, tuple(bert_layers), heads).eval()
