"""Texts become token ids, one tokenizer for each text encoder. Knows nothing of their use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from twinbrush.engine.config import EncoderConfig, PipelineConfig


class PromptTokenizer:
    """The tokenizers of a checkpoint.

    Args:
        folder: where the tokenizer files are.
        config: names them.

    Raises:
        ValueError: a file is missing or is not a tokenizer; the message names it.
    """

    def __init__(self, folder: Path, config: PipelineConfig):
        self._encoders = [
            (encoder, _load(folder / encoder.tokenizer)) for encoder in config.encoders
        ]

    def __call__(self, texts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """The inputs of every text encoder by model.

        `input_ids` (B, L) int64 is padded and truncated to the encoder's length, and
        `attention_mask` (B, L) int64 is 1 for a token and 0 for padding.
        """
        return {
            encoder.model: _inputs(encoder, tokenizer, texts)
            for encoder, tokenizer in self._encoders
        }

    def warnings(self, field: str, text: str) -> list[str]:
        """A sentence for each encoder that truncates the text."""
        counts = ((e, len(tokenizer.encode(text).ids)) for e, tokenizer in self._encoders)
        return [
            f"{field} has {count} tokens and was truncated to the {encoder.length} of"
            f" {encoder.model}"
            for encoder, count in counts
            if count > encoder.length
        ]


def _inputs(
    encoder: EncoderConfig, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    rows = [_truncated(tokenizer, text, encoder.length) for text in texts]
    if encoder.mask:
        # A tokenizer without special tokens gives no ids for an empty text, and attention needs
        # at least one token.
        rows = [ids or [encoder.pad] for ids in rows]
    inputs = {"input_ids": _padded(rows, encoder.length, encoder.pad)}
    if encoder.mask:
        inputs["attention_mask"] = _padded([[1] * len(ids) for ids in rows], encoder.length, 0)
    return inputs


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        text = f"{path} cannot be read ({error}): run `python -m export CHECKPOINT`"
        raise ValueError(text) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _truncated(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """Ids of a text; a long one loses its end but keeps the closing special token."""
    ids = tokenizer.encode(text).ids
    if len(ids) <= length:
        return ids
    closing = ids[-1:] if tokenizer.num_special_tokens_to_add(False) else []
    return ids[: length - len(closing)] + closing


def _padded(rows: list[list[int]], length: int, pad: int) -> np.ndarray:
    return np.array([row + [pad] * (length - len(row)) for row in rows], np.int64)
