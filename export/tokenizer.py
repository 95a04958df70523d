"""Loading the tokenizers of a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from export.checkpoint import Checkpoint, first_line
from networks.loading import CheckpointError


def load_tokenizer(checkpoint: Checkpoint, part: str) -> Any:
    """The tokenizer of a part, which has one of the tokenizers library.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    folder = checkpoint.folders[part]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        text = f"{folder} has no tokenizer that can be served: {first_line(error)}"
        raise CheckpointError(text) from error
    return tokenizer
