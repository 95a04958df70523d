"""Loading the tokenizers of a checkpoint, and checking what is exported of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTokenizer

from export.checkpoint import Checkpoint
from export.config_fields import shown
from export.weights import read_json
from networks.loading import CheckpointError, first_line

CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP_VOCABULARY, CLIP_MERGES = 49408, 48894  # of every published tower: bytes, merges, two marks
SIDES = ("padding_side", "truncation_side")
TEXT_FIELDS = ("tokenizer_class", "bos_token", "eos_token", "unk_token", "pad_token")
# Texts on which tokenizers of different rules differ: case, accents, spaces, digits, scripts.
TEXTS = (
    "", "a", "a small green star on white", "A Photo of 3 CATS, 8k, f/1.8", "naïve café Ångström",
    "  two  spaces\tand a tab\nand a line ", "it's won't we'll", "(a:1.2) [b] <c> {d} #e_f",
    "Straße, İstanbul, ﬁne, Ⅳ, ½", "wow! a!! star !", "\u201cso\u201d \u2014 it\u2019s\u00a0`x`",
    "红色的圆 赤い丸 빨간 원", "красный круг", "🟢 star ⭐️", "1234567",
)  # fmt: skip


def load_tokenizer(checkpoint: Checkpoint, part: str) -> Any:
    """The tokenizer of a part, which has one of the tokenizers library.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    folder = checkpoint.folders[part]
    # CLIP's is of the class that the checkpoint names, as in diffusers, whatever its files say.
    clip = checkpoint.classes[part] in CLIP
    tokenizer_class = CLIPTokenizer if clip else AutoTokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        wrong = _wrong_setting(folder)
        text = f"{folder} has no tokenizer that can be served: {first_line(error)}"
        raise CheckpointError(wrong or text) from error
    for name in SIDES:
        if clip and getattr(tokenizer, name) != "right":
            text = f"{folder}/tokenizer_config.json: {name}={getattr(tokenizer, name)!r}"
            raise CheckpointError(f"{text} is not served: must be right")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 1:
        text = f"{folder}/tokenizer_config.json: model_max_length={shown(length)} is invalid"
        raise CheckpointError(f"{text}: must be a whole number above 0")
    return tokenizer


def _wrong_setting(folder: Path) -> str | None:
    """The first field that a tokenizer cannot be made of, in a sentence."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        for field, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if field in TEXT_FIELDS and not isinstance(content, str):
                text = f"{folder / name}: {field}={shown(value)} is invalid"
                return f"{text}: must be a text"
    return None


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Any, source: str, part: str) -> None:
    """Raises CheckpointError where a tokenizer gives ids that its text model does not know.

    Args:
        checkpoint: that both are from.
        tokenizer: as `load_tokenizer` loads it.
        source, part: names of the tokenizer and of the text model.
    """
    known = checkpoint.config(part).get("vocab_size")
    length = checkpoint.config(part).get("max_position_embeddings")
    given = tokenizer.model_max_length  # which diffusers pads prompts to
    if source != "bert_tokenizer" and isinstance(length, int) and given < length:
        text = f"{checkpoint.folders[source]}/tokenizer_config.json: model_max_length={given} is"
        raise CheckpointError(f"{text} invalid: {part} has max_position_embeddings {length}")
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if isinstance(known, int) and largest >= known:
        raise CheckpointError(
            f"{checkpoint.folders[source]} gives {token!r} the id {largest}, {part} has vocab_size"
            f" {known}: they are of different checkpoints"
        )
    _check_merges(tokenizer, checkpoint.folders[source])


def _check_merges(tokenizer: Any, folder: Path) -> None:
    """Raises CheckpointError where the merges of CLIP's own vocabulary are cut short."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = model.get("merges")
    if merges and len(model["vocab"]) == CLIP_VOCABULARY and len(merges) < CLIP_MERGES:
        name = "merges.txt" if (folder / "merges.txt").is_file() else "tokenizer.json"
        text = f"{folder / name} is cut short: it has {len(merges)} merges of {CLIP_MERGES}"
        raise CheckpointError(f"{text}: download it again")


def check_ids(tokenizer: Any, folder: Path, file: Path) -> None:
    """Compares the exported file's ids with those of the tokenizer that it was made from.

    Args:
        tokenizer: as transformers loads it.
        folder: of the checkpoint that it was loaded from.
        file: the exported one.

    Raises:
        CheckpointError: it names the first text whose ids differ.
    """
    exported, own = _open_plain(file), folder / "tokenizer.json"
    original = _open_plain(own) if own.is_file() else None
    for text in TEXTS:
        wanted = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if exported.encode(text).ids != wanted:
            raise CheckpointError(
                f"{folder}: the exported tokenizer gives other ids for {text!r} than"
                f" {type(tokenizer).__name__}; it cannot be served"
            )
        if original is None:
            continue
        plain = exported.encode(text, add_special_tokens=False).ids
        if plain != original.encode(text, add_special_tokens=False).ids:
            raise CheckpointError(
                f"{own} gives other ids for {text!r} than transformers' {type(tokenizer).__name__}:"
                " save it with save_pretrained of the transformers version that it was made with"
            )


def _open_plain(file: Path) -> Tokenizer:
    """A tokenizer file without the padding and truncation that it was saved with."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
