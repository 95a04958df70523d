"""Scenes as a source to train on: each batch is a pure function of its step.

Knows nothing of stages; `training.data` says what they want of a source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.scenes.grounding import Grounding
from examples.scenes.scenes import (
    SIDE,
    Scene,
    describe,
    near_misses,
    render,
    sample_request,
    sample_scene,
)
from networks.loading import load_part
from training.data import CPU, BadInput, Batch, Source, no_pictures, on_device
from training.latents import FIRST_DRAW, LatentBatch, encoded
from training.run import digest

SCENES = 40_000  # distinct pictures for UNets; each gets a new caption every time it is drawn
WORKERS = 8  # processes at most that draw scenes for a GPU


def draw_scenes(seed: int, count: int) -> tuple[list[Scene], np.random.Generator]:
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
    """The scenes of `scenes-64`.

    Attributes:
        workers: processes that draw scenes ahead; 0 draws each when it is needed.
        with_truth: batches hold their scenes; without, captions alone, as other data has them.
    """

    workers: int = 0
    with_truth: bool = True
    side: int = SIDE
    vocabulary: int = 1000

    @property
    def objective(self) -> Grounding | None:
        return Grounding() if self.with_truth else None

    def corpus(self, seed: int, count: int) -> list[str]:
        return captions(*draw_scenes(seed, count))

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
        """Batches of scenes; captions alone are requests, as `sample_request` words them.

        Raises:
            BadInput: with `near`, `size` is no multiple of 4.
        """
        if near and size % 4:
            raise BadInput(f"--batch: {size} is no multiple of 4, a scene and three near misses")
        drawn = _Drawn(seed, size, captions_only, near, self.with_truth)
        return SceneBatches(drawn, device, self.workers)

    def latents(
        self, checkpoint: Path, cache: Path, size: int, device: torch.device
    ) -> SceneLatents:
        check_knows_scenes(checkpoint)  # before all are drawn
        return SceneLatents(checkpoint, cache, size, device)


def world_for(device: torch.device) -> SceneWorld:
    """Scenes that are drawn fast enough for a device."""
    return SceneWorld(min(WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0)


def knows_truth(source: Source) -> bool:
    """Whether a source is of scenes and its batches hold them."""
    return isinstance(source, SceneWorld) and source.with_truth


@dataclass(frozen=True)
class _Drawn(Dataset):
    """The batch of every step, drawn from `seed + step`."""

    seed: int
    size: int
    captions_only: bool = False
    near: bool = False
    with_truth: bool = True

    def __getitem__(self, step: int) -> Batch:
        if self.captions_only:
            rng = np.random.default_rng(self.seed + step)
            truth, texts = zip(*(sample_request(rng) for _ in range(self.size)), strict=True)
            return Batch(no_pictures(SIDE), [*texts], [*truth] if self.with_truth else [])
        scenes, rng = draw_scenes(self.seed + step, self.size // 4 if self.near else self.size)
        if self.near:
            scenes = [scene for base in scenes for scene in (base, *near_misses(base, rng))]
        texts = captions(scenes, rng)
        return Batch(pictures(scenes), texts, scenes if self.with_truth else [])


class SceneBatches:
    """Batches of scenes; their position is the step itself."""

    position = None

    def __init__(self, drawn: _Drawn, device: torch.device, workers: int):
        self._drawn, self._device, self._workers = drawn, device, workers
        self._ahead: Iterator[Batch] | None = None

    def resume(self, position: dict[str, Any] | None) -> None:
        _check_no_position(position)

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


class SceneLatents:
    """Latents of the training scenes, each time with a new caption: a pure function of a step."""

    position = None

    def __init__(self, checkpoint: Path, runs: Path, batch: int, device: torch.device = CPU):
        self.batch = batch
        seeds = range(50_000_000, 50_000_000 + SCENES // 100)
        self._scenes = [scene for seed in seeds for scene in draw_scenes(seed, 100)[0]]
        self._latents = scene_latents(checkpoint, runs, self._scenes, device)

    def resume(self, position: dict[str, Any] | None) -> None:
        _check_no_position(position)

    def at(self, step: int) -> LatentBatch:
        rng = np.random.default_rng(FIRST_DRAW + step)
        chosen = rng.integers(SCENES, size=self.batch)
        scenes = [self._scenes[i] for i in chosen]
        return LatentBatch(self._latents[chosen], captions(scenes, rng), rng, scenes)

    def report(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was started."""


def check_knows_scenes(checkpoint: Path) -> None:
    """Raises BadInput where a checkpoint has another autoencoder than a VQGAN."""
    vae_class = json.loads((checkpoint / "vae" / "config.json").read_text()).get("_class_name")
    if vae_class != "VQModel":
        raise BadInput(
            f"--data: {checkpoint.name}, whose vae is an {vae_class}, knows no scenes: name"
            " captioned pictures of its own world"
        )


@torch.no_grad()
def scene_latents(
    checkpoint: Path, runs: Path, scenes: list[Scene], device: torch.device
) -> Tensor:
    """Scaled latents of scenes (N, C, h, w), encoded once for each VQGAN and kept in `runs`.

    Raises:
        BadInput: as `check_knows_scenes`.
    """
    check_knows_scenes(checkpoint)
    key = digest([checkpoint / "vae"]) + repr(scenes)
    path = runs / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path)).to(device)
    vae = load_part(checkpoint / "vae", VQModel).to(device)
    parts = []
    for start in range(0, len(scenes), 100):
        parts.append(encoded(vae, pictures(scenes[start : start + 100]).to(device)))
    runs.mkdir(parents=True, exist_ok=True)
    whole = torch.cat(parts).contiguous()  # as it is read back: another layout rounds otherwise
    part = path.with_suffix(".part.npy")
    np.save(part, whole.cpu().numpy())
    os.replace(part, path)
    return whole


def _check_no_position(position: dict[str, Any] | None) -> None:
    """Raises BadInput if scenes are to continue from a position in other data."""
    if position is not None:
        raise BadInput("--data: none is given, but the run's save was trained on other data")
