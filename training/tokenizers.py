"""Tokenizers trained on the captions that a stage trains on."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from training.data import Source

CAPTIONS_A_WORD = 4  # captions read for each word of the vocabulary


def trained_tokenizer(
    kind: type[PreTrainedTokenizerBase], source: Source, seed: int, run: Path
) -> PreTrainedTokenizerBase:
    """A tokenizer of a class for a source, kept in the run, which goes on with the same one.

    The library does not fix the order of its tokens: another run may number some differently.
    """
    folder = run / "tokenizer"
    if not folder.exists():
        texts = source.corpus(seed, CAPTIONS_A_WORD * source.vocabulary)
        part = folder.with_suffix(".part")
        kind().train_new_from_iterator(texts, source.vocabulary).save_pretrained(part)
        os.replace(part, folder)
    return kind.from_pretrained(folder)
