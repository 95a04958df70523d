"""Loading the tokenizers of a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from export.checkpoint import Checkpoint, CheckpointError


def load_tokenizer(checkpoint: Checkpoint, part: str) -> Any:
    """The tokenizer of a part, which has one of the tokenizers library.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    folder = checkpoint.folders[part]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be served: {error}") from error
    return tokenizer
