"""Trajectories as tables of coefficients, and the update that they stand for.

Every sampler here is linear in what it sees. One call of the UNet at the latent x is a row:

    clean  = clean_x·x + clean_output·output             (the prediction of x_0)
    kept   = kept_x·x + kept_output·output               (pushed to the history)
    x      = x·x + output·output + past1·h1 + past2·h2 + past3·h3 + anchor·A + noise·n
    anchor = anchor_x·x + anchor_output·output + anchor_past1·h1 + ... + anchor_anchor·A

where h1, h2, h3 are the last three kept tensors, newest first, A is a latent that the sampler
carries from an earlier call, and n is unit noise. A row whose kept coefficients are all zero
keeps nothing; a row whose anchor coefficients are all zero leaves the anchor as it is.
Latents are variance-preserving, x_t = sqrt(alpha_bar)·x_0 + sqrt(1 - alpha_bar)·eps, whatever
space a sampler thinks in, so rows of different samplers share one call. This module knows no
sampler, model or request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

COLUMNS = (
    "x", "output", "past1", "past2", "past3", "anchor", "noise",
    "clean_x", "clean_output", "kept_x", "kept_output",
    "anchor_x", "anchor_output", "anchor_past1", "anchor_past2", "anchor_past3", "anchor_anchor",
)  # fmt: skip
X, OUTPUT, PAST, ANCHOR, NOISE = 0, 1, slice(2, 5), 5, 6
CLEAN, KEPT, ANCHOR_UPDATE = slice(7, 9), slice(9, 11), slice(11, 17)
HISTORY = 3  # tensors that a row can look back on


@dataclass(frozen=True)
class Trajectory:
    """All calls of the UNet for one image.

    Attributes:
        timesteps: the UNet's timestep at each call, (calls,) float32; see
            `samplers.FRACTIONAL` for which samplers need fractions.
        table: a row of COLUMNS for each call, (calls, 17) float32.
        ends_step: whether a call ends a step, (calls,) bool.
        initial_scale: factor of the unit noise that the trajectory starts from.
    """

    timesteps: np.ndarray
    table: np.ndarray
    ends_step: np.ndarray
    initial_scale: float = 1.0

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        return int(self.ends_step.sum())


@dataclass(eq=False)
class Latent:
    """One image's latent on its way, (C, h, w) each.

    Attributes:
        x: the UNet's next input.
        clean: the last prediction of the finished latent.
        history: what the last calls kept, newest first, at most three.
        anchor: a latent of an earlier call, where the sampler needs one.
    """

    x: np.ndarray
    clean: np.ndarray
    history: tuple[np.ndarray, ...] = ()
    anchor: np.ndarray | None = None

    @classmethod
    def start(cls, noise: np.ndarray, trajectory: Trajectory) -> Latent:
        """The latent before the first call, from unit noise."""
        return cls(noise * np.float32(trajectory.initial_scale), np.zeros_like(noise))


def build(
    timesteps: np.ndarray,
    *,
    ends_step: np.ndarray | None = None,
    initial_scale: float = 1.0,
    **columns: np.ndarray | float,
) -> Trajectory:
    """A trajectory from columns by name, each (calls,) or a number; others are zero.

    Raises:
        ValueError: a coefficient is not finite.
    """
    table = np.zeros((len(timesteps), len(COLUMNS)))
    for name, values in columns.items():
        table[:, COLUMNS.index(name)] = values
    if not np.isfinite(table).all():
        raise ValueError(
            "the scheduler's options give coefficients that are not finite:"
            " lower_order_final=False requires final_sigmas_type='sigma_min'."
        )
    ends = np.ones(len(timesteps), bool) if ends_step is None else ends_step
    return Trajectory(
        timesteps.astype(np.float32), table.astype(np.float32), ends, float(initial_scale)
    )


def advance(
    latents: Sequence[Latent],
    rows: np.ndarray,
    x: np.ndarray,
    output: np.ndarray,
    draw: Callable[[int], np.ndarray],
) -> None:
    """Moves every latent past one call of the UNet.

    Columns that few rows have are applied to those alone. A latent's bits do not depend on its
    neighbours, and no history is stacked.

    Args:
        latents: J latents; their x, clean, history and anchor are replaced.
        rows: the row of each latent's call, (J, 17) float32.
        x: the latents' x, stacked, (J, C, h, w) float32.
        output: what the UNet predicted for them, (J, C, h, w) float32.
        draw: returns unit noise (C, h, w) for the latent of an index; called only where the
            row has noise, once.
    """
    after = _combine(rows[:, X : OUTPUT + 1], x, output)
    clean = _combine(rows[:, CLEAN], x, output)
    for i, (latent, row) in enumerate(zip(latents, rows, strict=True)):
        _add_past(after[i], row[PAST], latent.history)
        if row[ANCHOR]:
            after[i] += row[ANCHOR] * latent.anchor
        if row[NOISE]:
            after[i] += row[NOISE] * draw(i)
        anchor = _next_anchor(latent, row[ANCHOR_UPDATE], x[i], output[i])
        if row[KEPT].any():
            same = np.array_equal(row[KEPT], row[CLEAN])
            kept = clean[i] if same else row[KEPT][0] * x[i] + row[KEPT][1] * output[i]
            latent.history = (kept, *latent.history[: HISTORY - 1])
        latent.x, latent.clean, latent.anchor = after[i], clean[i], anchor


def _next_anchor(
    latent: Latent, coefficients: np.ndarray, x: np.ndarray, output: np.ndarray
) -> np.ndarray | None:
    if not coefficients.any():
        return latent.anchor
    of_x, of_output, *of_past, of_anchor = coefficients
    if of_x == 1 and not coefficients[1:].any():
        return latent.x  # equals x, without a reference to the whole batch
    anchor = of_x * x + of_output * output
    _add_past(anchor, of_past, latent.history)
    if of_anchor:
        anchor += of_anchor * latent.anchor
    return anchor


def _add_past(
    total: np.ndarray, coefficients: Sequence[np.float32] | np.ndarray, history: Sequence
) -> None:
    for i, coefficient in enumerate(coefficients):
        if coefficient:
            total += coefficient * history[i]


def _combine(coefficients: np.ndarray, x: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Row by row: temporaries of all rows would be fresh memory each time, six times slower."""
    combined, part = np.empty_like(x), np.empty_like(x[0])
    for i, (of_x, of_output) in enumerate(coefficients):
        np.multiply(x[i], of_x, out=combined[i])
        combined[i] += np.multiply(output[i], of_output, out=part)
    return combined
