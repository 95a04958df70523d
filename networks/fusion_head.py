"""The cross-modal fusion head, as a torch module in diffusers layout.

CLIP tokens are the stream. At each level they attend to the BERT hidden states of a
matching depth through a tanh gate that starts at zero (Flamingo, arXiv:2204.14198, 2.2), so
a fresh head is the identity and any Stable-Diffusion or LCM checkpoint works unchanged.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class GatedCrossAttention(nn.Module):
    """One level: gated attention to BERT tokens, then a gated feed-forward layer."""

    def __init__(self, width: int, bert_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.bert_norm = nn.LayerNorm(bert_width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(bert_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.attention_gate = nn.Parameter(torch.zeros(width))
        self.feed_forward_gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, bert: Tensor, mask: Tensor) -> Tensor:
        q = self._split(self.to_q(self.norm(x)))
        k, v = (self._split(t) for t in self.to_kv(self.bert_norm(bert)).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, d)
        attended = self.to_out(attended.transpose(1, 2).flatten(2))
        x = x + torch.tanh(self.attention_gate) * attended
        return x + torch.tanh(self.feed_forward_gate) * self.feed_forward(x)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, d)


class FusionHead(ModelMixin, ConfigMixin):
    """Merges CLIP and BERT tokens into the UNet's conditioning.

    `bert_layers` names the BERT hidden states to attend to, one a level: 0 is the embedding
    output, `num_hidden_layers` the last.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 768,
        bert_width: int = 768,
        bert_layers: tuple[int, ...] = (4, 8, 12),
        heads: int = 12,
    ):
        super().__init__()
        self.levels = nn.ModuleList(
            GatedCrossAttention(width, bert_width, heads) for _ in bert_layers
        )

    def forward(self, clip_tokens: Tensor, bert_tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Fused tokens (B, L, width).

        Args:
            clip_tokens: (B, L, width), CLIP's last hidden state.
            bert_tokens: (B, levels, Lb, bert_width), BERT's hidden states at `bert_layers`.
            attention_mask: (B, Lb), 1 for a token and 0 for padding.
        """
        mask = attention_mask.bool()[:, None, None, :]
        mask = mask.expand(-1, 1, clip_tokens.shape[1], -1)  # (B, 1, L, Lb)
        x = clip_tokens
        for i, level in enumerate(self.levels):
            x = level(x, bert_tokens[:, i], mask)
        return x
