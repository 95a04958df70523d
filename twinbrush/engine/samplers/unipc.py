"""UniPC, a predictor-corrector of order 1 to 3 over predictions of x_0 (arXiv:2302.04867)."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinbrush.engine.samplers.rows import Trajectory, build
from twinbrush.engine.samplers.schedule import Levels, NoiseSchedule


def unipc(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """UniPC (algorithms 5 and 6) with B(h) of `solver_type`: `bh1` is -h, others exp(-h) - 1.

    The anchor is the corrected x of the last step: a call corrects the step that led to it,
    from there, and then predicts the next.
    """
    last = schedule.final_sigma()
    levels = schedule.solver_levels(steps, last)
    if last and schedule.sigma_schedule in ("karras", "exponential", "beta"):
        levels.sigmas[-1] = levels.sigmas[-2]
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    p, q = schedule.clean(alpha, sigma)
    orders = [_order(schedule, steps, i) for i in range(steps)]
    corrected = np.zeros((steps, 6))  # of x, output, past1 to past3, anchor
    after = np.zeros((steps, 6))
    for i in range(steps):
        corrected[i, 0] = 1.0
        if i:
            of_anchor, weights = _step(levels, i - 1, orders[i - 1], schedule, correct=True)
            corrected[i] = [weights[0] * p[i], weights[0] * q[i], *weights[1:], of_anchor]
        of_x, weights = _step(levels, i, orders[i], schedule, correct=False)
        after[i] = of_x * corrected[i]
        after[i, :5] += [weights[1] * p[i], weights[1] * q[i], *weights[2:], 0.0]
    names = ("x", "output", "past1", "past2", "past3", "anchor")
    columns: dict[str, Any] = dict(zip(names, after.T, strict=True))
    columns |= {f"anchor_{name}": column for name, column in zip(names, corrected.T, strict=True)}
    return build(
        levels.timesteps,
        clean_x=p,
        clean_output=q,
        kept_x=p,
        kept_output=q,
        **columns,
    )


def _order(schedule: NoiseSchedule, steps: int, i: int) -> int:
    order = min(schedule.solver_order, i + 1)
    return min(order, steps - i) if schedule.lower_order_final else order


def _step(
    levels: Levels, i: int, order: int, schedule: NoiseSchedule, correct: bool
) -> tuple[float, np.ndarray]:
    """Step i from level i: the weight of x, and of the predictions of x_0, (4,).

    Those are, in this order, at level i + 1 (0 for the predictor), i, i - 1 and i - 2.
    """
    alpha, sigma = levels.alpha, levels.sigma
    of_x = sigma[i + 1] / sigma[i]
    with np.errstate(divide="ignore"):
        logs = -np.log(levels.sigmas[: i + 2])  # lambda
    h = logs[i + 1] - logs[i]
    if order > 1 and np.isinf(h):
        return of_x, np.full(4, np.nan)  # refused by `build`
    gain = -np.expm1(-h)
    weights = np.array([0.0, gain, 0.0, 0.0])
    scale = h if schedule.solver_type == "bh1" else gain  # -B(h)
    if order == 1:
        if correct:
            weights += np.array([0.5, -0.5, 0.0, 0.0]) * scale
        return of_x, alpha[i + 1] * weights
    ratios = np.array([(logs[i - k] - logs[i]) / h for k in range(1, order)] + [1.0])
    shares = _shares(ratios, h, -scale, correct)
    differences = np.zeros((order, 4))  # (prediction - prediction at level i) / ratio
    for k in range(1, order):
        differences[k - 1, [1, k + 1]] = np.array([-1.0, 1.0]) / ratios[k - 1]
    differences[order - 1, :2] = [1.0, -1.0]
    weights += scale * (shares @ differences[: len(shares)])
    return of_x, alpha[i + 1] * weights


def _shares(ratios: np.ndarray, h: float, b_of_h: float, correct: bool) -> np.ndarray:
    """The weights rho of the differences: of all, or of those that the predictor knows."""
    order = len(ratios)
    phi, factorial, targets = np.expm1(-h) / -h - 1, 1, []
    for k in range(1, order + 1):
        targets.append(phi * factorial / b_of_h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(ratios, increasing=True).T  # (power, ratio)
    if correct:
        return np.linalg.solve(powers, targets)
    if order == 2:
        return np.array([0.5])
    return np.linalg.solve(powers[:-1, :-1], targets[:-1])
