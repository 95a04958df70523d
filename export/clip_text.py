"""CLIP's text tower: `input_ids` (B, L) to `clip_tokens` (B, L, Dc)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, integers


class ClipText(nn.Module):
    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).last_hidden_state.float()


def part(checkpoint: Checkpoint) -> Part:
    encoder = checkpoint.load("text_encoder", CLIPTextModel)
    config = encoder.config
    length, width = config.max_position_embeddings, config.hidden_size
    return Part(
        name="clip_text",
        module=ClipText(encoder),
        inputs={"input_ids": TensorSpec(torch.int64, (length,))},
        output=("clip_tokens", TensorSpec(torch.float32, (length, width))),
        example=lambda batch, size: {"input_ids": integers((batch, length), config.vocab_size)},
    )
