"""Texts become the UNet's conditioning: text encoders side by side, then fusion, then a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.models import Models
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.telemetry import Telemetry

CACHE_BYTES = 256 * 2**20
FUSION = "fusion"

Conditioning = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Text:
    """A text to encode; one that is `alone` never shares a call, so its bits are always equal."""

    text: str
    alone: bool = False


class Conditioner:
    """Encodes texts, at most `max_rows` a call, and keeps the latest ones. For one thread.

    Args:
        models: the served networks.
        config: which encoders run, and which of their outputs go where.
        tokenizer: of the encoders.
        max_rows: texts a call.
        telemetry: is told of hits and misses of the cache.
    """

    def __init__(
        self,
        models: Models,
        config: PipelineConfig,
        tokenizer: PromptTokenizer,
        max_rows: int,
        telemetry: Telemetry,
    ):
        self._models, self._config = models, config
        self._tokenizer, self._max_rows = tokenizer, max_rows
        self._telemetry = telemetry
        self._cache: OrderedDict[Text, Conditioning] = OrderedDict()  # without the batch axis
        self._cached_bytes = 0
        self._others = ThreadPoolExecutor(max(1, len(config.encoders) - 1), "encoders")

    def __call__(self, wanted: Sequence[Sequence[Text]]) -> list[dict[str, np.ndarray]]:
        """The UNet's inputs for each list of texts, (texts, ...) each, by name."""
        distinct = dict.fromkeys(text for texts in wanted for text in texts)
        missing = [text for text in distinct if text not in self._cache]
        for texts in self._calls(missing):
            for text, encoded in zip(texts, self._encode(texts), strict=True):
                self._cache[text] = encoded
                self._cached_bytes += _bytes(encoded)
        for text in distinct:
            self._cache.move_to_end(text)
        stacked = [self._stacked(texts) for texts in wanted]
        while self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])
        hits = sum(map(len, wanted)) - len(missing)
        self._telemetry.texts(hits, len(missing), self._cached_bytes)
        return stacked

    def close(self) -> None:
        self._others.shutdown()

    def _stacked(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        rows = [self._cache[text] for text in texts]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _calls(self, missing: Iterable[Text]) -> list[list[Text]]:
        alone, shared = [], []
        for text in missing:
            (alone if text.alone else shared).append(text)
        starts = range(0, len(shared), self._max_rows)
        return [shared[i : i + self._max_rows] for i in starts] + [[text] for text in alone]

    def _encode(self, texts: Sequence[Text]) -> list[Conditioning]:
        inputs = self._tokenizer([text.text for text in texts])
        first, *others = inputs
        running = [self._others.submit(self._models.run, name, inputs[name]) for name in others]
        masked = [given for given in inputs.values() if "attention_mask" in given]
        tensors = {**(masked[0] if masked else {}), **self._models.run(first, inputs[first])}
        for future in running:
            tensors |= future.result()
        tensors |= self._models.run(
            FUSION, {name: tensors[name] for name in self._config.fusion_inputs}
        )
        kept = [name for name in self._config.unet_inputs if name in tensors]
        return [{name: tensors[name][i].copy() for name in kept} for i in range(len(texts))]


def _bytes(conditioning: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in conditioning.values())
