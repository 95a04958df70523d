"""BERT: `input_ids` and `attention_mask` (B, Lb) to `bert_tokens` (B, levels, Lb, Db).

The levels are the hidden states that the fusion head attends to. Any text model of
transformers can stand here: RoBERTa, DistilBERT, GPT-2, T5's encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
)

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, integers, padding_mask
from export.tokenizer import load_tokenizer
from networks.loading import CheckpointError, first_line

MAX_TOKENS = 77  # prompts are padded to this or to what the model takes, the smaller


class Bert(nn.Module):
    def __init__(self, encoder: nn.Module, layers: list[int]):
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        # T5's states in FP16 are of both precisions, which ONNX would not stack.
        return torch.stack([out.hidden_states[i].float() for i in self.layers], dim=1)


def part(checkpoint: Checkpoint) -> Part:
    encoder = _load(checkpoint)
    encoder.config.return_dict = True  # whatever its file says
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # makes one vector of a text; nothing here asks for it
    config = encoder.config
    layers = _layers(checkpoint, config.num_hidden_layers)
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    tokenizer = load_tokenizer(checkpoint, "bert_tokenizer")
    length = min(MAX_TOKENS, positions, tokenizer.model_max_length)
    return Part(
        name="bert",
        module=Bert(encoder, layers),
        inputs={
            "input_ids": TensorSpec(torch.int64, (length,)),
            "attention_mask": TensorSpec(torch.int64, (length,)),
        },
        outputs={
            "bert_tokens": TensorSpec(torch.float32, (len(layers), length, config.hidden_size)),
        },
        example=lambda batch, size: {
            "input_ids": integers((batch, length), config.vocab_size),
            "attention_mask": padding_mask(batch, length),
        },
        full_precision=tuple(
            module
            for name, module in encoder.named_modules()
            if name.rpartition(".")[2] in (encoder._keep_in_fp32_modules or ())
        ),
    )


def _load(checkpoint: Checkpoint) -> nn.Module:
    model_class, options, _ = _class(checkpoint)
    return checkpoint.load("bert", model_class, **options)


def build(checkpoint: Checkpoint) -> nn.Module:
    """The network with random weights, on torch's current device."""
    model_class, options, config = _class(checkpoint)
    return model_class.from_config(config, **options)


def _class(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any], Any]:
    options: dict[str, Any] = {"trust_remote_code": False}
    config = _config(checkpoint, options)
    encodes = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if hasattr(config, "relative_attention_num_buckets"):  # T5: torch cannot export its fused form
        options["attn_implementation"] = "eager"
    # The encoder alone, where a model also has a decoder.
    return AutoModelForTextEncoding if encodes else AutoModel, options, config


def _config(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    folder = checkpoint.folders["bert"]
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except Exception as error:
        kind = checkpoint.config("bert").get("model_type")
        text = f"{folder} has a config.json that cannot be read: {first_line(error)}"
        if kind not in CONFIG_MAPPING:
            text = f"{folder} has model_type {kind!r}, which transformers does not know"
            text += "; code that a checkpoint brings is not run"
        raise CheckpointError(text) from error


def check_layers(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the fusion head names hidden states that there are not."""
    folder = checkpoint.folders["fusion"]
    layers = checkpoint.config("fusion").get("bert_layers")
    if not layers:
        raise CheckpointError(f"{folder} names no bert_layers")
    depth = _config(checkpoint, {"trust_remote_code": False}).num_hidden_layers
    if not isinstance(layers, list) or not all(type(i) is int and 0 <= i <= depth for i in layers):
        text = f"{folder}/config.json: bert_layers={layers!r} is invalid"
        raise CheckpointError(f"{text}: must be a list of numbers from 0 to {depth}")


def _layers(checkpoint: Checkpoint, depth: int) -> list[int]:
    """The hidden states that the fusion head was made for, or one at each third."""
    if "fusion" in checkpoint.folders:
        check_layers(checkpoint)
        return checkpoint.config("fusion")["bert_layers"]
    return sorted({max(1, depth * third // 3) for third in (1, 2, 3)})
