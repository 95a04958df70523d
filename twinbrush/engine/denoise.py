"""One denoising step for images that differ in timestep, sampler, guidance and step count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from twinbrush.engine.batcher import Job
from twinbrush.engine.samplers import Latent, Trajectory, advance


class Models(Protocol):
    """The served networks, wherever they run."""

    def run(self, model: str, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """The named output of a model for one batch; blocks until it is there."""
        ...


@dataclass(eq=False)
class ImageJob(Job):
    """One image on its way from noise to a latent.

    Attributes:
        trajectory: its sampler's table, of `steps` steps.
        hidden: conditioning of its rows, (rows, L, D); with two, the second is negative.
        timestep_cond: guidance embedding of its rows, (rows, E), where the UNet takes one.
        guidance_scale: weight of the first row against the second.
        noise: draws of this image alone.
        shape: of the latent, (C, h, w).
        latent: its state; drawn at the first step, so that what waits is small.
    """

    trajectory: Trajectory
    hidden: np.ndarray
    timestep_cond: np.ndarray | None
    guidance_scale: float
    noise: np.random.Generator
    shape: tuple[int, int, int]
    latent: Latent = field(init=False)

    def begin(self) -> None:
        self.latent = Latent.start(self.draw(), self.trajectory)

    @property
    def x(self) -> np.ndarray:
        return self.latent.x

    @property
    def clean(self) -> np.ndarray:
        return self.latent.clean

    def draw(self) -> np.ndarray:
        return self.noise.standard_normal(self.shape, np.float32)


def denoise_step(models: Models, jobs: Sequence[ImageJob], buckets: Sequence[int] = ()) -> None:
    """Moves every job one step along its trajectory, with one call of the UNet.

    Args:
        jobs: as the batcher chose them: all latents of one shape, `job.step` already counted.
        buckets: ascending row counts that the call is padded up to; none pads nothing.
    """
    for job in jobs:
        if job.step == 1:
            job.begin()
    rows = np.array([job.rows for job in jobs])
    first = np.cumsum(rows) - rows  # each job's first row
    sample = np.repeat(np.stack([job.x for job in jobs]), rows, axis=0)  # (B, C, h, w)
    times = [job.trajectory.timesteps[job.step - 1] for job in jobs]
    inputs = {
        "sample": sample,
        "timestep": np.repeat(np.array(times, np.int64), rows),
        "encoder_hidden_states": np.concatenate([job.hidden for job in jobs]),
    }
    if embeddings := [job.timestep_cond for job in jobs if job.timestep_cond is not None]:
        inputs["timestep_cond"] = np.concatenate(embeddings)
    padded = next((size for size in buckets if size >= len(sample)), len(sample))
    if padded > len(sample):
        take = np.minimum(np.arange(padded), len(sample) - 1)  # repeat the last row
        inputs = {name: tensor[take] for name, tensor in inputs.items()}
    output = models.run("unet", inputs, "model_output")

    last = output[first + rows - 1]
    scale = _column([job.guidance_scale for job in jobs])
    model_output = last + scale * (output[first] - last)  # one row: last is first
    table = np.stack([job.trajectory.table[job.step - 1] for job in jobs])
    latents = [job.latent for job in jobs]
    advance(latents, table, sample[first], model_output, lambda i: jobs[i].draw())


def _column(values) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
