"""A prompt becomes CLIP ids, BERT ids and a mask. Knows nothing of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from twinbrush.engine.config import PipelineConfig


@dataclass(frozen=True)
class Tokens:
    """Token ids of `B` texts.

    Attributes:
        clip_ids: (B, L) int64, padded.
        bert_ids: (B, Lb) int64, padded.
        bert_mask: (B, Lb) int64, 1 for a token and 0 for padding.
    """

    clip_ids: np.ndarray
    bert_ids: np.ndarray
    bert_mask: np.ndarray


class PromptTokenizer:
    """Both tokenizers of a checkpoint, from `clip_tokenizer.json` and `bert_tokenizer.json`.

    Raises:
        ValueError: a file is not there or is no tokenizer; the message names it.
    """

    def __init__(self, folder: Path, config: PipelineConfig):
        self._clip = _load(folder / "clip_tokenizer.json")
        self._bert = _load(folder / "bert_tokenizer.json")
        self._config = config

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokens of the texts, cut where they are too long (see `warnings`)."""
        config = self._config
        clip = [_cut(self._clip, text, config.clip_tokens) for text in texts]
        # A tokenizer without special tokens makes nothing of an empty text; one token stands in.
        bert = [_cut(self._bert, text, config.bert_tokens) or [config.bert_pad] for text in texts]
        return Tokens(
            clip_ids=_padded(clip, config.clip_tokens, config.clip_pad),
            bert_ids=_padded(bert, config.bert_tokens, config.bert_pad),
            bert_mask=_padded([[1] * len(ids) for ids in bert], config.bert_tokens, 0),
        )

    def warnings(self, field: str, text: str) -> list[str]:
        """A sentence for each encoder that does not see the whole text."""
        limits = (
            ("CLIP", self._clip, self._config.clip_tokens),
            ("BERT", self._bert, self._config.bert_tokens),
        )
        counts = ((name, len(tok.encode(text).ids), limit) for name, tok, limit in limits)
        return [
            f"{field} has {count} {name} tokens and was cut to {limit}"
            for name, count, limit in counts
            if count > limit
        ]


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        text = f"{path} cannot be read ({error}): run `python -m export CHECKPOINT`"
        raise ValueError(text) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _cut(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """Ids of a text; a long one loses its end but keeps the closing special token."""
    ids = tokenizer.encode(text).ids
    if len(ids) <= length:
        return ids
    closing = ids[-1:] if tokenizer.num_special_tokens_to_add(False) else []
    return ids[: length - len(closing)] + closing


def _padded(rows: list[list[int]], length: int, pad: int) -> np.ndarray:
    return np.array([row + [pad] * (length - len(row)) for row in rows], np.int64)
