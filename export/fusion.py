"""The fusion head: the encoders' tokens to `encoder_hidden_states` (B, L, D).

The tokens of several CLIP towers are joined along their width. BERT's enter through the
cross-modal head; a checkpoint without BERT has CLIP's tokens alone, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec, normal, padding_mask
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError

TOKENS = {"clip_text": "clip_tokens", "clip_text_2": "clip_tokens_2"}


class Fusion(nn.Module):
    def __init__(self, head: FusionHead):
        super().__init__()
        self.head = head

    def forward(self, clip_tokens: Tensor, bert_tokens: Tensor, attention_mask: Tensor) -> Tensor:
        dtype = self.head.dtype
        return self.head(clip_tokens.to(dtype), bert_tokens.to(dtype), attention_mask).float()


class TwoTowers(nn.Module):
    """The head behind the joined tokens of two towers."""

    def __init__(self, head: FusionHead):
        super().__init__()
        self.head = head

    def forward(
        self,
        clip_tokens: Tensor,
        clip_tokens_2: Tensor,
        bert_tokens: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        dtype = self.head.dtype
        joined = torch.cat([clip_tokens, clip_tokens_2], dim=-1).to(dtype)
        return self.head(joined, bert_tokens.to(dtype), attention_mask).float()


class Joined(nn.Module):
    """The tokens of one or two towers, without a head."""

    def forward(self, clip_tokens: Tensor, clip_tokens_2: Tensor | None = None) -> Tensor:
        if clip_tokens_2 is None:
            return clip_tokens.clone()
        return torch.cat([clip_tokens, clip_tokens_2], dim=-1)


def part(checkpoint: Checkpoint, towers: Sequence[Part], bert: Part | None) -> Part:
    """The head behind parts that were loaded before; a new one where the checkpoint has none.

    Raises:
        CheckpointError: its widths are not those of the encoders.
    """
    specs = {TOKENS[tower.name]: tower.outputs[TOKENS[tower.name]] for tower in towers}
    length = next(iter(specs.values())).axes[0]
    width = sum(spec.axes[-1] for spec in specs.values())
    hidden = {"encoder_hidden_states": TensorSpec(torch.float32, (length, width))}
    if bert is None:
        return Part(
            name="fusion",
            module=Joined(),
            inputs=specs,
            outputs=hidden,
            example=lambda batch, size: _normal(specs, batch),
        )
    bert_spec, mask = bert.outputs["bert_tokens"], bert.inputs["attention_mask"]
    if "fusion" in checkpoint.folders:
        head = checkpoint.load("fusion", FusionHead)
    else:
        head = new_head(width, bert_spec.axes[-1], bert.module.layers)
    for name, own, other in (
        ("width", head.config.width, width),
        ("bert_width", head.config.bert_width, bert_spec.axes[-1]),
    ):
        if own != other:
            raise CheckpointError(f"fusion has {name} {own}, its encoder has {other}")
    tokens = specs | {"bert_tokens": bert_spec}
    return Part(
        name="fusion",
        module=TwoTowers(head) if len(towers) > 1 else Fusion(head),
        inputs=tokens | {"attention_mask": mask},
        outputs=hidden,
        example=lambda batch, size: {
            **_normal(tokens, batch),
            "attention_mask": padding_mask(batch, mask.axes[0]),
        },
    )


def _normal(specs: dict[str, TensorSpec], batch: int) -> dict[str, Tensor]:
    return {name: normal((batch, *spec.axes)) for name, spec in specs.items()}


def new_head(width: int, bert_width: int, bert_layers: list[int]) -> FusionHead:
    """A head that returns CLIP's tokens unchanged, ready to be trained."""
    heads = max(count for count in range(1, 17) if width % count == 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusionHead(width, bert_width, tuple(bert_layers), heads).eval()
