"""Texts become the UNet's conditioning: text encoders side by side, then fusion, then a cache.

A text of several chunks has its chunks encoded apart and joined on the token axis. The fusion head
merges each chunk with the text model's tokens of the whole text: that model reads words, and
what relates them does not end where CLIP's tokens do. Weights apply to CLIP's tokens before
the head, each tower's by itself. Pooled text is that of the first chunk, without weights.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.models import Models
from twinbrush.engine.newcomers import Gathering
from twinbrush.engine.prompt import Chunks, PromptTokenizer
from twinbrush.engine.prompt_syntax import PLAIN
from twinbrush.engine.telemetry import Telemetry

LEAST_MEAN = 1e-3  # of tokens, as a share of their deviation; a smaller one is rounding error
FUSION = "fusion"

Conditioning = Mapping[str, np.ndarray]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Text:
    """A text to encode; one that is `alone` never shares a call, so its bits are always equal.

    Attributes:
        syntax: that it is read in.
        loras: the scale of each LoRA, where encoders take them.
        chunks: that it is encoded in; the conditioner sets it to the most of a request's texts.
    """

    text: str
    alone: bool = False
    syntax: str = PLAIN
    loras: tuple[float, ...] = ()
    chunks: int = 1


class Conditioner:
    """Encodes texts, at most `max_rows` a call, and keeps the latest ones. For one thread.

    Attributes:
        gathering: what it learned from its calls.

    Args:
        models: the served networks.
        config: which encoders run, and which of their outputs go where.
        tokenizer: of the encoders.
        max_rows: texts a call.
        telemetry: is told of hits and misses of the cache.
        cache_bytes: that the kept conditioning may have.
    """

    def __init__(
        self,
        models: Models,
        config: PipelineConfig,
        tokenizer: PromptTokenizer,
        max_rows: int,
        telemetry: Telemetry,
        cache_bytes: int,
    ):
        self._models, self._config = models, config
        self._tokenizer, self._max_rows = tokenizer, max_rows
        self._telemetry, self._cache_bytes = telemetry, cache_bytes
        self._cache: OrderedDict[Text, Conditioning] = OrderedDict()  # without the batch axis
        self._cached_bytes = 0
        self._prepared: dict[Text, Chunks] = {}
        self.gathering = Gathering()
        self._others = ThreadPoolExecutor(max(1, len(config.encoders) - 1), "encoders")

    def __call__(
        self, wanted: Sequence[Sequence[Text]], networks_done: Callable[[], None] = lambda: None
    ) -> list[dict[str, np.ndarray]]:
        """The UNet's inputs for each list of texts, (texts, ...) each, by name.

        The texts of a list have equally many chunks: UNets attend to all tokens, without a mask.
        `networks_done` is called once the last network has run.
        """
        wanted = [self._in_equal_chunks(texts) for texts in wanted]
        distinct = dict.fromkeys(text for texts in wanted for text in texts)
        missing = [text for text in distinct if text not in self._cache]
        calls = [(texts, *self._run_networks(texts)) for texts in self._calls(missing)]
        networks_done()
        for texts, counts, encoded, fused in calls:
            for text, made in zip(texts, self._parts(counts, encoded, fused), strict=True):
                self._cache[text] = made
                self._cached_bytes += _bytes(made)
        for text in distinct:
            self._cache.move_to_end(text)
        stacked = [self._stacked(texts) for texts in wanted]
        self._prepared.clear()  # of texts that were encoded otherwise, or not at all
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])
        hits = sum(map(len, wanted)) - len(missing)
        self._telemetry.texts(hits, len(missing), self._cached_bytes)
        return stacked

    def needs_call(self, texts: Sequence[Text]) -> bool:
        """Whether encoding them takes a call that they may share with others."""
        texts = self._in_equal_chunks(texts)
        return any(not text.alone and text not in self._cache for text in texts)

    def prepare(self, texts: Sequence[Text]) -> bool:
        """Tokenizes texts that are to be encoded next; returns whether that takes a call."""
        missing = [text for text in self._in_equal_chunks(texts) if text not in self._cache]
        self._prepared |= {text: self._tokens(text) for text in missing}
        return bool(missing)

    def close(self) -> None:
        self._others.shutdown()

    def _stacked(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        rows = [self._cache[text] for text in texts]
        if len(rows) == 1:
            return {name: tensor[None] for name, tensor in rows[0].items()}
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _calls(self, missing: Iterable[Text]) -> list[list[Text]]:
        alone, shared = [], []
        for text in missing:
            (alone if text.alone else shared).append(text)
        starts = range(0, len(shared), self._max_rows)
        return [shared[i : i + self._max_rows] for i in starts] + [[text] for text in alone]

    def _in_equal_chunks(self, texts: Sequence[Text]) -> list[Text]:
        counts = [self._tokenizer.count_chunks(text.text, text.syntax) for text in texts]
        return [replace(text, chunks=max(counts)) for text in texts]

    def _tokens(self, text: Text) -> Chunks:
        return self._tokenizer.chunks(text.text, text.syntax, text.chunks, text.loras)

    def _run_networks(self, texts: Sequence[Text]) -> tuple[list[int], Tensors, Tensors]:
        """The chunks of each text, what the encoders give side by side, and what fusion makes."""
        prompts = [self._prepared.pop(text, None) or self._tokens(text) for text in texts]
        began = time.monotonic()
        first, *others = prompts[0].inputs
        running = [self._others.submit(self._run_encoder, name, prompts) for name in others]
        encoded = self._run_encoder(first, prompts)
        for future in running:
            encoded |= future.result()
        fused = self._run(FUSION, {name: encoded[name] for name in self._config.fusion_inputs})
        self.gathering.observe(len(texts), time.monotonic() - began)
        return [prompt.count for prompt in prompts], encoded, fused

    def _parts(self, counts: Sequence[int], encoded: Tensors, fused: Tensors) -> list[Conditioning]:
        """The conditioning of each text of a call."""
        kept = [name for name in self._config.unet_inputs if name in fused or name in encoded]
        ends = np.cumsum(counts)
        rows = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return [
            {n: np.concatenate(fused[n][r]) if n in fused else encoded[n][r.start].copy()
             for n in kept}
            for r in rows
        ]  # fmt: skip

    def _run_encoder(self, model: str, prompts: Sequence[Chunks]) -> Tensors:
        """An encoder's outputs, and its attention mask, a row for each chunk of each prompt."""
        given = [prompt.inputs[model] for prompt in prompts]
        inputs = {name: np.concatenate([tensors[name] for tensors in given]) for name in given[0]}
        outputs = self._run(model, inputs)
        if model in prompts[0].weights:
            weights = np.concatenate([prompt.weights[model] for prompt in prompts])
            tokens = {name: outputs[name] for name in outputs if name in self._config.fusion_inputs}
            return outputs | {name: emphasize(tokens[name], weights) for name in tokens}
        outputs |= {name: inputs[name] for name in inputs if name in self._config.fusion_inputs}
        counts = [prompt.count for prompt in prompts]
        if max(counts) == 1:
            return outputs
        return {name: np.repeat(tensor, counts, axis=0) for name, tensor in outputs.items()}

    def _run(self, model: str, inputs: Tensors) -> Tensors:
        """Runs a model on at most `max_rows` rows a call."""
        count = len(next(iter(inputs.values())))
        if count <= self._max_rows:
            return dict(self._models.run(model, inputs))
        parts = [
            self._models.run(model, {n: t[i : i + self._max_rows] for n, t in inputs.items()})
            for i in range(0, count, self._max_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def emphasize(tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """CLIP's tokens times their weights, brought back to their mean.

    The emphasis of A1111 (its "Original" mode, `sd_emphasis`) and of diffusers' community
    pipelines with weighted prompts. The mean is taken over each chunk, as A1111 does. One that is
    nearly zero is not restored: the ratio of two such means is noise.

    Args:
        tokens: of chunks, (chunks, L, D) float32.
        weights: of tokens, (chunks, L) float32; chunks whose weights are all 1 stay as they are.
    """
    weighted = [i for i, row in enumerate(weights) if (row != 1).any()]
    if not weighted:
        return tokens
    tokens = tokens.copy()
    for i in weighted:
        scaled = tokens[i] * weights[i, :, None]
        mean = scaled.mean(dtype=np.float64)
        restored = abs(mean) > LEAST_MEAN * scaled.std(dtype=np.float64)
        ratio = tokens[i].mean(dtype=np.float64) / mean if restored else 1.0
        tokens[i] = scaled * np.float32(ratio)
    return tokens


def _bytes(conditioning: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in conditioning.values())
