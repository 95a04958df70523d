"""One denoising step for images that differ in everything but the shape of their latents."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from twinbrush.engine.guidance import Guidance, rescale
from twinbrush.engine.models import Models
from twinbrush.engine.samplers import Latent, Trajectory, advance
from twinbrush.engine.samplers.rows import NOISE


@dataclass(eq=False)
class Painting:
    """One image on its way from noise to a picture.

    Attributes:
        trajectory: its sampler's rows of coefficients, one a UNet call.
        conditioning: UNet inputs by name, (rows, ...) each; with two rows the second is the
            negative one. Empty until the texts are encoded.
        guidance: scale, rescaling and interval.
        noise: the generator that only this image draws from.
        shape: of the latent, (C, h, w).
        calls: UNet calls that it has had.
        latent: drawn at the first call or before it.
    """

    trajectory: Trajectory
    conditioning: Mapping[str, np.ndarray]
    guidance: Guidance
    noise: np.random.Generator
    shape: tuple[int, int, int]
    calls: int = field(default=0, init=False)
    latent: Latent = field(init=False)
    _ahead: np.ndarray | None = field(default=None, init=False)  # noise drawn before its time

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

    @property
    def needs_noise(self) -> bool:
        """Whether the update after the next call adds noise."""
        return bool(self.trajectory.table[self.calls][NOISE])

    def begin(self) -> None:
        """Draws the first noise, unless it is drawn."""
        if not hasattr(self, "latent"):
            self.latent = Latent.start(self.draw(), self.trajectory)

    def draw_ahead(self) -> None:
        """Draws the noise of the update after the next call, unless it is drawn or needs none."""
        if self.needs_noise and self._ahead is None:
            self._ahead = self.draw()

    def draw(self) -> np.ndarray:
        """Unit noise, which may have been drawn ahead."""
        ahead, self._ahead = self._ahead, None
        return self.noise.standard_normal(self.shape, np.float32) if ahead is None else ahead


class Denoiser:
    """Moves paintings along their trajectories, one UNet call at a time. For one thread.

    The noise of a step is drawn while the UNet runs. Conditioning is stacked once for successive
    calls of the same paintings, as arrays that are not writeable, see `Models.run`.

    Args:
        models: the served networks.
        turn: is held while the UNet runs.
    """

    def __init__(
        self, models: Models, turn: Callable[[], AbstractContextManager[None]] = nullcontext
    ):
        self._models, self._turn = models, turn
        self._noise = ThreadPoolExecutor(1, "noise")
        self._stacked_for: tuple[list[weakref.ref[Painting]], list[int], int] = [], [], 0
        self._conditioning: dict[str, np.ndarray] = {}

    def step(
        self,
        model: str,
        paintings: Sequence[Painting],
        buckets: Sequence[int] = (),
        renew: Callable[[], Sequence[Painting] | None] = lambda: None,
    ) -> float:
        """Moves every painting one call along its trajectory.

        When the call fails, no painting has changed, and noise that was drawn for it is kept.

        Args:
            model: the UNet to call.
            paintings: all with latents of one shape.
            buckets: ascending row counts that the call is padded up to; none pads nothing.
            renew: called when the turn has come; gives other paintings in their place, or None.

        Returns:
            Seconds that the UNet took, without the wait for its turn.

        Raises:
            Exception: the UNet failed.
        """
        x, rows, inputs = self._prepare(paintings, buckets)
        drawn = None
        try:
            with self._turn():
                if renewed := renew():
                    paintings = renewed
                    x, rows, inputs = self._prepare(paintings, buckets)
                if _any_noise(paintings):
                    drawn = self._noise.submit(_draw_ahead, paintings)
                started = time.monotonic()
                output = self._models.run(model, inputs)["model_output"]
                seconds = time.monotonic() - started
        finally:
            if drawn is not None:
                drawn.result()
        if len(output) > len(paintings):  # two rows of some, or padding
            first = np.cumsum(rows) - rows  # each painting's first row
            output = _guided(paintings, output[first], output[first + rows - 1])
        table = np.stack([p.trajectory.table[p.calls] for p in paintings])
        latents = [painting.latent for painting in paintings]
        advance(latents, table, x, output, lambda i: paintings[i].draw())
        for painting in paintings:
            painting.calls += 1
        return seconds

    def draw_first(self, paintings: Sequence[Painting]) -> Future:
        """Begins to draw the first noise of paintings that no call has yet."""
        return self._noise.submit(_begin, paintings)

    def close(self) -> None:
        self._noise.shutdown()

    def _prepare(
        self, paintings: Sequence[Painting], buckets: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The paintings' latents (J, C, h, w), the rows of each, and the UNet's inputs."""
        for painting in paintings:
            painting.begin()
        rows = np.array([painting.rows for painting in paintings])
        x = np.stack([painting.latent.x for painting in paintings])
        return x, rows, self._inputs(paintings, rows, x, buckets)

    def _inputs(
        self, paintings: Sequence[Painting], rows: np.ndarray, x: np.ndarray, buckets: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """The UNet's inputs for all rows, (B, ...) each; the last row repeats up to a bucket."""
        count = int(rows.sum())
        size = next((size for size in buckets if size >= count), count)
        times = [painting.trajectory.timesteps[painting.calls] for painting in paintings]
        moving = {
            "sample": x if count == len(x) else np.repeat(x, rows, axis=0),
            "timestep": np.repeat(np.array(times, np.float32), rows),
        }
        moving = {name: _padded(tensor, size) for name, tensor in moving.items()}
        return moving | self._stacked(paintings, rows.tolist(), size)

    def _stacked(
        self, paintings: Sequence[Painting], rows: list[int], size: int
    ) -> dict[str, np.ndarray]:
        """Conditioning for all rows, padded to `size`; the same arrays as before if equal."""
        refs, *shape = self._stacked_for
        if shape == [rows, size] and [ref() for ref in refs] == list(paintings):
            return self._conditioning
        stacked = {}
        for name in paintings[0].conditioning:
            parts = [p.conditioning[name][:count] for p, count in zip(paintings, rows, strict=True)]
            stacked[name] = _padded(np.concatenate(parts), size)
            stacked[name].setflags(write=False)
        self._stacked_for = [weakref.ref(painting) for painting in paintings], rows, size
        self._conditioning = stacked
        return stacked


def _any_noise(paintings: Sequence[Painting]) -> bool:
    return any(painting.needs_noise for painting in paintings)


def _begin(paintings: Sequence[Painting]) -> None:
    for painting in paintings:
        painting.begin()


def _draw_ahead(paintings: Sequence[Painting]) -> None:
    for painting in paintings:
        painting.draw_ahead()


def _guided(
    paintings: Sequence[Painting], prompted: np.ndarray, unprompted: np.ndarray
) -> np.ndarray:
    """Classifier-free guidance (arXiv:2207.12598); with one row, both predictions are the same."""
    scale = _column([painting.guidance.scale for painting in paintings])
    guided = unprompted + scale * (prompted - unprompted)
    strength = np.array([painting.guidance.rescale for painting in paintings], np.float32)
    return rescale(guided, prompted, strength) if strength.any() else guided


def _padded(tensor: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size`."""
    count = len(tensor)
    return tensor if size == count else tensor[np.minimum(np.arange(size), count - 1)]


def _column(values) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
