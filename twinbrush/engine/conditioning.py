"""Texts become the UNet's conditioning: CLIP and BERT side by side, then fusion, then a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twinbrush.engine.denoise import Models
from twinbrush.engine.prompt import PromptTokenizer

CACHED_TEXTS = 256


@dataclass(frozen=True)
class Text:
    """A text to encode; one that is `alone` never shares a call, so its bits are always equal."""

    text: str
    alone: bool = False


class Conditioner:
    """Encodes texts, at most `max_rows` a call, and keeps those seen last. For one thread."""

    def __init__(self, models: Models, tokenizer: PromptTokenizer, max_rows: int):
        self._models, self._tokenizer, self._max_rows = models, tokenizer, max_rows
        self._cache: OrderedDict[Text, np.ndarray] = OrderedDict()  # (L, D) each
        self._beside = ThreadPoolExecutor(1, "bert")

    def __call__(self, wanted: Sequence[Sequence[Text]]) -> list[np.ndarray]:
        """Conditioning of each list of texts: (texts, L, D)."""
        distinct = dict.fromkeys(text for texts in wanted for text in texts)
        for texts in self._calls(text for text in distinct if text not in self._cache):
            for text, hidden in zip(texts, self._encode(texts), strict=True):
                self._cache[text] = hidden.copy()
        for text in distinct:
            self._cache.move_to_end(text)
        stacked = [np.stack([self._cache[text] for text in texts]) for texts in wanted]
        while len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return stacked

    def close(self) -> None:
        self._beside.shutdown()

    def _calls(self, missing: Iterable[Text]) -> list[list[Text]]:
        alone, shared = [], []
        for text in missing:
            (alone if text.alone else shared).append(text)
        starts = range(0, len(shared), self._max_rows)
        return [shared[i : i + self._max_rows] for i in starts] + [[text] for text in alone]

    def _encode(self, texts: Sequence[Text]) -> np.ndarray:
        tokens = self._tokenizer([text.text for text in texts])
        bert = {"input_ids": tokens.bert_ids, "attention_mask": tokens.bert_mask}
        bert_tokens = self._beside.submit(self._models.run, "bert", bert, "bert_tokens")
        clip_tokens = self._models.run("clip_text", {"input_ids": tokens.clip_ids}, "clip_tokens")
        fusion = {
            "clip_tokens": clip_tokens,
            "bert_tokens": bert_tokens.result(),
            "attention_mask": tokens.bert_mask,
        }
        return self._models.run("fusion", fusion, "encoder_hidden_states")
