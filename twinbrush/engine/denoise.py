"""One denoising step for images that differ in everything but the shape of their latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from twinbrush.engine.models import Models
from twinbrush.engine.samplers import Trajectory


@dataclass(eq=False)
class Latent:
    """The latent of one image on its way from noise to a picture.

    Attributes:
        trajectory: its sampler's rows of coefficients, one a UNet call.
        conditioning: UNet inputs of its rows by name, (rows, ...) each; with two rows the second
            is the negative one.
        guidance_scale: weight of the first row against the second.
        noise: the generator that only this image draws from.
        shape: (C, h, w).
        done: UNet calls that it has had.
        x: the latent now, (C, h, w); drawn at the first call, so that an image that waits is small.
        clean: the last prediction of the finished latent, (C, h, w).
    """

    trajectory: Trajectory
    conditioning: Mapping[str, np.ndarray]
    guidance_scale: float
    noise: np.random.Generator
    shape: tuple[int, int, int]
    done: int = field(default=0, init=False)
    x: np.ndarray = field(init=False)
    clean: np.ndarray = field(init=False)

    @property
    def rows(self) -> int:
        """UNet rows of its next call."""
        return len(next(iter(self.conditioning.values())))

    @property
    def finished(self) -> bool:
        return self.done == self.trajectory.steps

    def begin(self) -> None:
        """Draws the first noise, unless a failed call has drawn it."""
        if not hasattr(self, "x"):
            self.x = self.draw() * np.float32(self.trajectory.initial_scale)
            self.clean = np.zeros_like(self.x)

    def draw(self) -> np.ndarray:
        return self.noise.standard_normal(self.shape, np.float32)


def denoise_step(
    models: Models, model: str, latents: Sequence[Latent], buckets: Sequence[int] = ()
) -> None:
    """Moves every latent one call along its trajectory, with one call of the UNet.

    When the call fails, no latent has changed and no noise was drawn for the step.

    Args:
        models: the served networks.
        model: the UNet to call.
        latents: all of one shape.
        buckets: ascending row counts that the call is padded up to; none pads nothing.

    Raises:
        Exception: the UNet failed.
    """
    for latent in latents:
        latent.begin()
    rows = np.array([latent.rows for latent in latents])
    first = np.cumsum(rows) - rows  # each latent's first row
    output = models.run(model, _padded(_stacked(latents, rows), buckets))["model_output"]
    last = output[first + rows - 1]
    scale = _column([latent.guidance_scale for latent in latents])
    model_output = last + scale * (output[first] - last)  # one row: last is first
    table = np.stack([latent.trajectory.table[latent.done] for latent in latents])
    a, b, c, d, p, q = (_column(column) for column in table.T)
    x = np.stack([latent.x for latent in latents])
    x_next = a * x + b * model_output + c * np.stack([latent.clean for latent in latents])
    clean = p * x + q * model_output
    for i, latent in enumerate(latents):
        latent.x, latent.clean = x_next[i], clean[i]
        if table[i, 3]:
            latent.x += d[i] * latent.draw()
        latent.done += 1


def _stacked(latents: Sequence[Latent], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The UNet's inputs for all rows, (B, ...) each."""
    times = [latent.trajectory.timesteps[latent.done] for latent in latents]
    inputs = {
        "sample": np.repeat(np.stack([latent.x for latent in latents]), rows, axis=0),
        "timestep": np.repeat(np.array(times, np.int64), rows),
    }
    for name in latents[0].conditioning:
        inputs[name] = np.concatenate([latent.conditioning[name] for latent in latents])
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
