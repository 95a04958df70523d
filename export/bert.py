"""BERT: `input_ids` and `attention_mask` (B, Lb) to `bert_tokens` (B, levels, Lb, Db).

The levels are the hidden states that the checkpoint's fusion head attends to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertModel

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, integers, padding_mask

MAX_TOKENS = 77  # prompts are padded to this or to what BERT takes, the smaller


class Bert(nn.Module):
    def __init__(self, encoder: BertModel, layers: list[int]):
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return torch.stack([out.hidden_states[i] for i in self.layers], dim=1)


def part(checkpoint: Checkpoint) -> Part:
    encoder = checkpoint.load("text_encoder_2", BertModel, add_pooling_layer=False)
    config = encoder.config
    layers = checkpoint.config("fusion")["bert_layers"]
    length = min(MAX_TOKENS, config.max_position_embeddings)
    return Part(
        name="bert",
        module=Bert(encoder, layers),
        inputs={
            "input_ids": TensorSpec(torch.int64, (length,)),
            "attention_mask": TensorSpec(torch.int64, (length,)),
        },
        output=(
            "bert_tokens",
            TensorSpec(torch.float32, (len(layers), length, config.hidden_size)),
        ),
        example=lambda batch, size: {
            "input_ids": integers((batch, length), config.vocab_size),
            "attention_mask": padding_mask(batch, length),
        },
    )
