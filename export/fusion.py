"""The fusion head: CLIP and BERT tokens to `encoder_hidden_states` (B, L, D)."""

from __future__ import annotations

import torch

from export.checkpoint import Checkpoint, CheckpointError
from export.fusion_head import FusionHead
from export.part import Part, TensorSpec, normal, padding_mask


def part(checkpoint: Checkpoint, clip: Part, bert: Part) -> Part:
    """The head between two parts that were loaded before.

    Raises:
        CheckpointError: its widths are not those of the encoders.
    """
    head = checkpoint.load("fusion", FusionHead)
    clip_axes, bert_axes = clip.output[1].axes, bert.output[1].axes
    for name, width, axes in (
        ("width", head.config.width, clip_axes),
        ("bert_width", head.config.bert_width, bert_axes),
    ):
        if width != axes[-1]:
            raise CheckpointError(f"fusion has {name} {width}, its encoder has {axes[-1]}")
    mask_axes = bert.inputs["attention_mask"].axes
    return Part(
        name="fusion",
        module=head,
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
