"""CLIP's text tower: `input_ids` (B, L) to `clip_tokens` (B, L, Dc).

With a second tower beside it (SDXL) the tokens are those of the layer before the last, without
the final norm, as in diffusers. `--clip-skip` takes the tokens of an earlier layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from export.checkpoint import Checkpoint
from export.lora_set import LoraScales, attach_loras, with_scales
from export.part import Part, TensorSpec, integers


class ClipText(nn.Module):
    """The tower up to a hidden state.

    Args:
        encoder: the tower.
        skip: layers at the end whose results are not used.
        norm: whether the final norm is applied.
        scales: of the LoRAs beside its layers, None where it has none.
    """

    def __init__(
        self, encoder: CLIPTextModel, skip: int, norm: bool, scales: LoraScales | None = None
    ):
        super().__init__()
        self.encoder, self.skip, self.norm = encoder, skip, norm
        self.scales = scales or LoraScales(0)

    def forward(self, input_ids: Tensor, lora_scale: Tensor | None = None) -> Tensor:
        with self.scales.of(lora_scale):
            return self._encode(input_ids)

    def _encode(self, input_ids: Tensor) -> Tensor:
        if not self.skip and self.norm:
            return self.encoder(input_ids=input_ids).last_hidden_state.float()
        states = self.encoder(input_ids=input_ids, output_hidden_states=True).hidden_states
        tokens = states[-(self.skip + 1)]
        return (self.encoder.final_layer_norm(tokens) if self.norm else tokens).float()


def part(checkpoint: Checkpoint) -> Part:
    encoder = checkpoint.load("text_encoder", CLIPTextModel)
    encoder.config.return_dict = True  # whatever its file says
    config = encoder.config
    length, width = config.max_position_embeddings, config.hidden_size
    two_towers = "text_encoder_2" in checkpoint.folders
    scales = attach_loras(encoder, "text_encoder", checkpoint.serving.lora_set)
    plain = Part(
        name="clip_text",
        module=ClipText(encoder, checkpoint.clip_skip + two_towers, not two_towers, scales),
        inputs={"input_ids": TensorSpec(torch.int64, (length,))},
        outputs={"clip_tokens": TensorSpec(torch.float32, (length, width))},
        example=lambda batch, size: {"input_ids": integers((batch, length), config.vocab_size)},
    )
    return with_scales(plain, scales)
