"""What stages train on: the interface, and scenes, each batch a pure function of its step.

Captioned pictures from disk and the web, the other thing to train on, are in `captioned`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.scenes.scenes import (
    SIDE,
    Scene,
    describe,
    near_misses,
    render,
    sample_request,
    sample_scene,
)

CPU = torch.device("cpu")
MAX_TOKENS = 40  # of both tokenizers; the longest caption of a scene has 32 words


class BadInput(ValueError):
    """What was asked for cannot be done; one sentence that names the flag and its value."""


@dataclass(frozen=True)
class Batch:
    """What a stage sees at a step.

    Attributes:
        pictures: (B, 3, S, S) in [-1, 1]; (0, 3, S, S) where only captions were asked for.
        captions: one a picture.
        scenes: what each caption is true of; empty where only its words are known.
    """

    pictures: Tensor
    captions: list[str]
    scenes: list[Scene] = field(default_factory=list)


class Batches(Protocol):
    """Batches in the order of the steps."""

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the next batch begins, in JSON's types; None where its step says it."""

    def resume(self, position: dict[str, Any] | None) -> None:
        """Goes on from a position.

        Raises:
            BadInput: it is a position in data of another kind.
        """

    def at(self, step: int) -> Any:
        """What belongs to a step; steps are asked for in order, each once."""

    def report(self) -> str:
        """What was used and what was left out so far, for people; empty if all is used."""

    def close(self) -> None:
        """Ends what was started to prepare batches ahead."""


class Source(Protocol):
    """A world to train on."""

    @property
    def side(self) -> int:
        """Of its pictures, in pixels."""

    @property
    def vocabulary(self) -> int:
        """The size of a tokenizer for its captions."""

    def corpus(self, seed: int, count: int) -> list[str]:
        """Captions to train tokenizers on, `count` at most."""

    def sample(self, seed: int, count: int) -> Batch:
        """The same pictures and captions every time, `count` at most, on the CPU."""

    def batches(
        self,
        seed: int,
        size: int,
        device: torch.device,
        captions_only: bool = False,
        near: bool = False,
    ) -> Batches:
        """`Batch`es of `size` on `device`, in an order drawn from `seed`.

        With `near`, a source that can draws a picture's near misses beside it.
        """


def scenes(seed: int, count: int) -> tuple[list[Scene], np.random.Generator]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)], rng


def pictures(batch: list[Scene]) -> Tensor:
    """Rendered scenes in [-1, 1]: (B, 3, 64, 64)."""
    stacked = np.stack([render(scene) for scene in batch])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def captions(batch: list[Scene], rng: np.random.Generator) -> list[str]:
    return [describe(scene, rng) for scene in batch]


@dataclass(frozen=True)
class SceneWorld:
    """The scenes of `scenes-64`; `workers` processes draw them ahead, none draws on demand.

    Without `told` batches have captions and no truth, as other data has. With `requests` they
    are what a painter is asked for: see `sample_request`.
    """

    workers: int = 0
    told: bool = True
    requests: bool = False
    side: int = SIDE
    vocabulary: int = 1000

    def corpus(self, seed: int, count: int) -> list[str]:
        return captions(*scenes(seed, count))

    def sample(self, seed: int, count: int) -> Batch:
        return _Drawn(seed, count)[0]

    def batches(
        self,
        seed: int,
        size: int,
        device: torch.device,
        captions_only: bool = False,
        near: bool = False,
    ) -> SceneBatches:
        if near and size % 4:
            raise BadInput(f"--batch: {size} is no multiple of 4, a scene and three near misses")
        return SceneBatches(
            _Drawn(seed, size, captions_only, near, self.told, self.requests), device, self.workers
        )


SCENES = SceneWorld()


def knows_truth(source: Source) -> bool:
    """Whether a source knows what is in its pictures, beside its captions."""
    return isinstance(source, SceneWorld) and source.told


def requests_of(source: Source) -> Source:
    """Scenes with captions as `sample_request` has them; any other source as it is."""
    return replace(source, requests=True) if isinstance(source, SceneWorld) else source


@dataclass(frozen=True)
class _Drawn(Dataset):
    """The batch of every step, drawn from `seed + step`."""

    seed: int
    size: int
    captions_only: bool = False
    near: bool = False
    told: bool = True
    requests: bool = False

    def __getitem__(self, step: int) -> Batch:
        if self.requests:
            rng = np.random.default_rng(self.seed + step)
            truth, texts = zip(*(sample_request(rng) for _ in range(self.size)), strict=True)
            return Batch(no_pictures(), [*texts], [*truth] if self.told else [])
        truth, rng = scenes(self.seed + step, self.size // 4 if self.near else self.size)
        if self.near:
            truth = [scene for base in truth for scene in (base, *near_misses(base, rng))]
        texts = captions(truth, rng)
        drawn = no_pictures() if self.captions_only else pictures(truth)
        return Batch(drawn, texts, truth if self.told else [])


def no_pictures(side: int = SIDE) -> Tensor:
    return torch.empty(0, 3, side, side)


class SceneBatches:
    """Batches of scenes; their position is the step itself."""

    position = None

    def __init__(self, drawn: _Drawn, device: torch.device, workers: int):
        self._drawn, self._device, self._workers = drawn, device, workers
        self._ahead: Iterator[Batch] | None = None

    def resume(self, position: dict[str, Any] | None) -> None:
        check_no_position(position)

    def at(self, step: int) -> Batch:
        if not self._workers:
            return on_device(self._drawn[step], self._device)
        if self._ahead is None:
            loader = DataLoader(
                self._drawn, batch_size=None, sampler=range(step, 2**40), num_workers=self._workers,
                prefetch_factor=4,
            )  # fmt: skip
            self._ahead = iter(loader)
        return on_device(next(self._ahead), self._device)

    def report(self) -> str:
        return ""

    def close(self) -> None:
        self._ahead = None


def check_no_position(position: dict[str, Any] | None) -> None:
    """Raises BadInput where scenes shall go on from a position in other data."""
    if position is not None:
        raise BadInput("--data: none is given, but the run's save was trained on some")


def on_device(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, pictures=batch.pictures.to(device))


def token_ids(
    tokenizer, texts: list[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded to `MAX_TOKENS`: both (B, MAX_TOKENS) int64."""
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
