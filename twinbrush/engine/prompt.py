"""Texts become token ids, one tokenizer for each text encoder. Knows nothing of their use.

With A1111's syntax, the tokens of a text fill chunks, each as long as CLIP's towers take; a chunk
has its own start and end tokens, and every token has a weight. Text models beside CLIP read the
words of the whole text once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from twinbrush.engine.config import LORA_SCALE, EncoderConfig, PipelineConfig
from twinbrush.engine.prompt_syntax import A1111, PLAIN, has_syntax, parse, without_syntax

KEPT_TEXTS = 256  # whose ids a tokenizer remembers: a request's texts are counted, then encoded
COMMA_REACH = 20  # tokens before the end of a full chunk in which it prefers to end at a comma


@dataclass(frozen=True)
class Chunks:
    """A text as its encoders take it.

    Attributes:
        inputs: by model; a row a chunk for CLIP's towers, one row for other encoders. Those that
            take LoRAs have `lora_scale` (rows, K) float32.
        weights: of the tokens, (chunks, L) float32, by tower.
    """

    inputs: dict[str, dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        return len(next(iter(self.weights.values())))


class TextTokenizer:
    """A tokenizer that remembers the ids of its latest texts; from any thread.

    Args:
        tokenizer: without padding and truncation.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.special_tokens: int = tokenizer.num_special_tokens_to_add(False)

        @lru_cache(KEPT_TEXTS)
        def ids(text: str, special: bool) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=special).ids)

        self._ids = ids

    def ids(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens around them or without."""
        return list(self._ids(text, special))


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
        self._max_chunks = config.max_chunks

    def __call__(self, texts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """The inputs of every text encoder by model, of texts without syntax.

        `input_ids` (B, L) int64 is padded and truncated to the encoder's length, and
        `attention_mask` (B, L) int64 is 1 for a token and 0 for padding.
        """
        return {
            encoder.model: _inputs(encoder, tokenizer, texts)
            for encoder, tokenizer in self._encoders
        }

    def chunks(self, text: str, syntax: str, count: int = 1, loras: Sequence[float] = ()) -> Chunks:
        """A text in `count` chunks; a shorter one is filled up with those of an empty text.

        Args:
            loras: the scale of each LoRA, K of them.
        """
        made = self._chunks(text, syntax, count)
        for encoder, _ in self._encoders:
            if encoder.takes_loras:
                inputs = made.inputs[encoder.model]
                rows = len(inputs["input_ids"])
                inputs[LORA_SCALE] = np.tile(np.array(loras, np.float32), (rows, 1))
        return made

    def _chunks(self, text: str, syntax: str, count: int) -> Chunks:
        if syntax == PLAIN:
            inputs = self([text])
            shapes = {e.model: (1, e.length) for e, _ in self._encoders if e.is_tower}
            return Chunks(inputs, {model: np.ones(s, np.float32) for model, s in shapes.items()})
        inputs, weights = {}, {}
        for encoder, tokenizer in self._encoders:
            if not encoder.is_tower:
                inputs[encoder.model] = _inputs(encoder, tokenizer, [without_syntax(text)])
                continue
            filled = fill_chunks(tokenizer, text, encoder.length)[:count]
            filled += [[] for _ in range(count - len(filled))]
            inputs[encoder.model], weights[encoder.model] = _framed(encoder, tokenizer, filled)
        return Chunks(inputs, weights)

    def count_chunks(self, text: str, syntax: str) -> int:
        """Chunks that a text takes, at most as many as the UNet does."""
        if syntax == PLAIN:
            return 1
        return min(self._max_chunks, max(count for _, count in self._counts(text)))

    def _counts(self, text: str) -> list[tuple[EncoderConfig, int]]:
        return [
            (encoder, len(fill_chunks(tokenizer, text, encoder.length)))
            for encoder, tokenizer in self._encoders
            if encoder.is_tower
        ]

    def warnings(self, field: str, text: str, syntax: str = PLAIN) -> list[str]:
        """A sentence for each encoder that truncates the text, and one on syntax that is off."""
        if syntax == A1111:
            towers = [
                f"{field} has {count} chunks of tokens and was truncated to the"
                f" {self._max_chunks} of {encoder.model}"
                for encoder, count in self._counts(text)
                if count > self._max_chunks
            ]
            others = [entry for entry in self._encoders if not entry[0].is_tower]
            return towers + _truncations(others, field, without_syntax(text))
        found = _truncations(self._encoders, field, text)
        if has_syntax(text):
            found.append(
                f"{field} has weights or breaks, which are read literally; prompt_syntax"
                f" {A1111} applies them"
            )
        return found


def _truncations(
    encoders: Sequence[tuple[EncoderConfig, TextTokenizer]], field: str, text: str
) -> list[str]:
    counts = ((e, len(tokenizer.ids(text))) for e, tokenizer in encoders)
    return [
        f"{field} has {count} tokens and was truncated to the {encoder.length} of {encoder.model}"
        for encoder, count in counts
        if count > encoder.length
    ]


Token = tuple[int, float]  # id and weight


def fill_chunks(tokenizer: TextTokenizer, text: str, length: int) -> list[list[Token]]:
    """The tokens of a text in chunks of at most `length` - 2, at least one.

    As A1111 (`sd_hijack_clip`): a chunk ends at a break or where it is full; a full one ends
    behind its last comma, if that is at most `COMMA_REACH` tokens away.

    Args:
        tokenizer: of a tower.
        text: in A1111's syntax.
        length: of the tower's inputs, with its start and end tokens.
    """
    commas = tokenizer.ids(",", special=False)
    chunks: list[list[Token]] = []
    for section in parse(text):
        tokens = [
            (token, weight)
            for words, weight in section
            for token in tokenizer.ids(words, special=False)
        ]
        chunks.append([])
        while tokens:
            end = _chunk_end([token for token, _ in tokens], length - 2, commas)
            chunks[-1], tokens = tokens[:end], tokens[end:]
            if tokens:
                chunks.append([])
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _chunk_end(ids: list[int], room: int, commas: list[int]) -> int:
    if len(ids) <= room or ids[room] in commas:
        return min(len(ids), room)
    near = range(room - 1, max(-1, room - 1 - COMMA_REACH), -1)
    return next((place + 1 for place in near if ids[place] in commas), room)


def _framed(
    encoder: EncoderConfig, tokenizer: TextTokenizer, chunks: list[list[Token]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`input_ids` of chunks between their special tokens, and the weights, (chunks, L) each."""
    start, end = tokenizer.ids("")
    ids = [[start, *(token for token, _ in chunk), end] for chunk in chunks]
    weights = np.ones((len(chunks), encoder.length), np.float32)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return {"input_ids": _padded(ids, encoder.length, encoder.pad)}, weights


def _inputs(
    encoder: EncoderConfig, tokenizer: TextTokenizer, texts: Sequence[str]
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


def _load(path: Path) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        text = f"{path} cannot be read ({error}): run `python -m export CHECKPOINT`"
        raise ValueError(text) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextTokenizer(tokenizer)


def _truncated(tokenizer: TextTokenizer, text: str, length: int) -> list[int]:
    """Ids of a text; a long one loses its end but keeps the closing special token."""
    ids = tokenizer.ids(text)
    if len(ids) <= length:
        return ids
    closing = ids[-1:] if tokenizer.special_tokens else []
    return ids[: length - len(closing)] + closing


def _padded(rows: list[list[int]], length: int, pad: int) -> np.ndarray:
    return np.array([row + [pad] * (length - len(row)) for row in rows], np.int64)
