"""Batches of scenes: pictures, captions and tokens, each a pure function of a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.scenes import Scene, describe, render, sample_scene

MAX_TOKENS = 40  # of both tokenizers; the longest caption has 32 words


def scenes(seed: int, count: int) -> tuple[list[Scene], np.random.Generator]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)], rng


def pictures(batch: list[Scene]) -> Tensor:
    """Rendered scenes in [-1, 1]: (B, 3, 64, 64)."""
    stacked = np.stack([render(scene) for scene in batch])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def captions(batch: list[Scene], rng: np.random.Generator) -> list[str]:
    return [describe(scene, rng) for scene in batch]


def corpus(seed: int, count: int) -> list[str]:
    """Captions to train tokenizers on."""
    batch, rng = scenes(seed, count)
    return captions(batch, rng)


def token_ids(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded to `MAX_TOKENS`: both (B, MAX_TOKENS) int64."""
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return encoded["input_ids"], encoded["attention_mask"]
