"""SDXL's second text tower, from `input_ids` (B, L).

Returns `clip_tokens_2` (B, L, Dc2) and `text_embeds` (B, Dp).

The tokens are those of the layer before the last, without the final norm; `text_embeds` is the
projected state of the end-of-text token after the last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from export.checkpoint import Checkpoint
from export.lora_set import LoraScales, attach_loras, with_scales
from export.part import Part, TensorSpec, integers


class ClipText2(nn.Module):
    """The tower up to a hidden state, and its projection; `skip` layers are left out of the
    tokens, never of the projection.
    """

    def __init__(
        self, encoder: CLIPTextModelWithProjection, skip: int, scales: LoraScales | None = None
    ):
        super().__init__()
        self.encoder, self.skip = encoder, skip
        self.scales = scales or LoraScales(0)

    def forward(self, input_ids: Tensor, lora_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with self.scales.of(lora_scale):
            out = self.encoder(input_ids=input_ids, output_hidden_states=True)
        return out.hidden_states[-(self.skip + 1)].float(), out.text_embeds.float()


def part(checkpoint: Checkpoint) -> Part:
    encoder = checkpoint.load("text_encoder_2", CLIPTextModelWithProjection)
    encoder.config.return_dict = True  # whatever its file says
    config = encoder.config
    length = config.max_position_embeddings
    scales = attach_loras(encoder, "text_encoder_2", checkpoint.serving.lora_set)
    plain = Part(
        name="clip_text_2",
        module=ClipText2(encoder, checkpoint.clip_skip + 1, scales),
        inputs={"input_ids": TensorSpec(torch.int64, (length,))},
        outputs={
            "clip_tokens_2": TensorSpec(torch.float32, (length, config.hidden_size)),
            "text_embeds": TensorSpec(torch.float32, (config.projection_dim,)),
        },
        example=lambda batch, size: {"input_ids": integers((batch, length), config.vocab_size)},
    )
    return with_scales(plain, scales)
