"""One denoising step for images that differ in everything but the shape of their latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from twinbrush.engine.guidance import Guidance, rescale
from twinbrush.engine.models import Models
from twinbrush.engine.samplers import Latent, Trajectory, advance


@dataclass(eq=False)
class Painting:
    """One image on its way from noise to a picture.

    Attributes:
        trajectory: its sampler's rows of coefficients, one a UNet call.
        conditioning: UNet inputs by name, (rows, ...) each; with two rows the second is the
            negative one.
        guidance: scale, rescaling and interval.
        noise: the generator that only this image draws from.
        shape: of the latent, (C, h, w).
        calls: UNet calls that it has had.
        latent: drawn at the first call, so that an image that waits is small.
    """

    trajectory: Trajectory
    conditioning: Mapping[str, np.ndarray]
    guidance: Guidance
    noise: np.random.Generator
    shape: tuple[int, int, int]
    calls: int = field(default=0, init=False)
    latent: Latent = field(init=False)

    @property
    def steps(self) -> int:
        """Denoising steps that it has done; some samplers take several calls a step."""
        return int(self.trajectory.ends_step[: self.calls].sum())

    @property
    def finished(self) -> bool:
        return self.calls == self.trajectory.calls

    def rows_at(self, call: int) -> int:
        """UNet rows of a call: outside the guidance interval the prompt alone has one."""
        rows = len(next(iter(self.conditioning.values())))
        step = int(self.trajectory.ends_step[:call].sum())
        return rows if self.guidance.applies(step / self.trajectory.steps) else 1

    @property
    def rows(self) -> int:
        """UNet rows of its next call."""
        return self.rows_at(self.calls)

    def begin(self) -> None:
        """Draws the first noise, unless a failed call has drawn it."""
        if not hasattr(self, "latent"):
            self.latent = Latent.start(self.draw(), self.trajectory)

    def draw(self) -> np.ndarray:
        return self.noise.standard_normal(self.shape, np.float32)


def denoise_step(
    models: Models, model: str, paintings: Sequence[Painting], buckets: Sequence[int] = ()
) -> None:
    """Moves every painting one call along its trajectory, with one call of the UNet.

    When the call fails, no painting has changed and no noise was drawn for the step.

    Args:
        models: the served networks.
        model: the UNet to call.
        paintings: all with latents of one shape.
        buckets: ascending row counts that the call is padded up to; none pads nothing.

    Raises:
        Exception: the UNet failed.
    """
    for painting in paintings:
        painting.begin()
    rows = np.array([painting.rows for painting in paintings])
    first = np.cumsum(rows) - rows  # each painting's first row
    x = np.stack([painting.latent.x for painting in paintings])
    inputs = _stacked(paintings, rows, x)
    output = models.run(model, _padded(inputs, buckets))["model_output"]
    model_output = _guided(paintings, output[first], output[first + rows - 1])
    table = np.stack([p.trajectory.table[p.calls] for p in paintings])
    latents = [painting.latent for painting in paintings]
    advance(latents, table, x, model_output, lambda i: paintings[i].draw())
    for painting in paintings:
        painting.calls += 1


def _guided(
    paintings: Sequence[Painting], prompted: np.ndarray, unprompted: np.ndarray
) -> np.ndarray:
    """Classifier-free guidance (arXiv:2207.12598); with one row, both predictions are the same."""
    scale = _column([painting.guidance.scale for painting in paintings])
    guided = unprompted + scale * (prompted - unprompted)
    strength = np.array([painting.guidance.rescale for painting in paintings], np.float32)
    return rescale(guided, prompted, strength) if strength.any() else guided


def _stacked(
    paintings: Sequence[Painting], rows: np.ndarray, x: np.ndarray
) -> dict[str, np.ndarray]:
    """The UNet's inputs for all rows, (B, ...) each."""
    times = [painting.trajectory.timesteps[painting.calls] for painting in paintings]
    inputs = {
        "sample": np.repeat(x, rows, axis=0),
        "timestep": np.repeat(np.array(times, np.float32), rows),
    }
    for name in paintings[0].conditioning:
        parts = [p.conditioning[name][:count] for p, count in zip(paintings, rows, strict=True)]
        inputs[name] = np.concatenate(parts)
    return inputs


def _padded(inputs: dict[str, np.ndarray], buckets: Sequence[int]) -> dict[str, np.ndarray]:
    """Repeats the last row up to the next bucket."""
    count = len(inputs["sample"])
    size = next((size for size in buckets if size >= count), count)
    if size == count:
        return inputs
    take = np.minimum(np.arange(size), count - 1)
    return {name: tensor[take] for name, tensor in inputs.items()}


def _column(values) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
