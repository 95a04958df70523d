"""Samplers of the ODE over sigma, noise over signal: euler, euler_a, heun, lms.

They think of x/alpha, whose derivative by sigma is the predicted noise. The rows give x
itself, so that scaling the UNet's input is part of the row; the last row leaves x/alpha,
which differs from x only where a trajectory ends above sigma 0. All take fractional timesteps.
"""

from __future__ import annotations

import numpy as np

from twinbrush.engine.samplers.rows import Trajectory, build
from twinbrush.engine.samplers.schedule import Levels, NoiseSchedule

LMS_ORDER = 4


def euler(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Euler's method on the probability-flow ODE (arXiv:2206.00364, algorithm 1, no churn)."""
    levels = schedule.spaced_levels(steps, schedule.final_sigma())
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    p, q = schedule.clean(alpha, sigma)
    alpha_next = _scale_after(levels)
    share = levels.sigmas[1:] / levels.sigmas[:-1]  # of the way from x_0 that is left
    return build(
        levels.timesteps,
        x=alpha_next * (share / alpha + (1 - share) * p),
        output=alpha_next * (1 - share) * q,
        clean_x=p,
        clean_output=q,
        initial_scale=_initial_scale(schedule, levels),
    )


def euler_a(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Euler's method with ancestral noise: crowsonkb/k-diffusion, `sample_euler_ancestral`."""
    levels = schedule.spaced_levels(steps, 0.0)
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    before, after = levels.sigmas[:-1], levels.sigmas[1:]
    up = np.sqrt(after**2 * (before**2 - after**2) / before**2)
    down = np.sqrt(after**2 - up**2)
    p, q = schedule.clean(alpha, sigma)
    alpha_next = _scale_after(levels)
    share = down / before
    return build(
        levels.timesteps,
        x=alpha_next * (share / alpha + (1 - share) * p),
        output=alpha_next * (1 - share) * q,
        noise=alpha_next * up,
        clean_x=p,
        clean_output=q,
        initial_scale=_initial_scale(schedule, levels),
    )


def heun(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Heun's second-order method (arXiv:2206.00364, algorithm 1, no churn).

    A step has two calls: one at its start, which steps as Euler and anchors x, and one at its
    end, which steps again from the anchor by the mean of both slopes. The last step, to
    sigma 0, has the first call alone: 2·steps - 1 calls.
    """
    levels = schedule.spaced_levels(steps, 0.0)
    calls = 2 * steps - 1
    at = (np.arange(calls) + 1) // 2  # the level of each call
    second = np.arange(calls) % 2 == 1
    alpha, sigma = levels.alpha[at], levels.sigma[at]
    p, q = schedule.clean(alpha, sigma)
    r, s = schedule.epsilon(alpha, sigma)
    start = np.where(second, at - 1, at)
    span = levels.sigmas[start + 1] - levels.sigmas[start]
    scale = levels.alpha[start + 1]
    slope = np.where(second, span / 2, span)  # weight of this call's noise
    anchored = scale / levels.alpha[start]
    ends_step = second.copy()
    ends_step[-1] = True
    first = ~second
    return build(
        levels.timesteps[at],
        ends_step=ends_step,
        initial_scale=_initial_scale(schedule, levels),
        x=np.where(second, 0.0, anchored) + scale * slope * r,
        output=scale * slope * s,
        past1=np.where(second, scale * slope, 0.0),
        anchor=np.where(second, anchored, 0.0),
        anchor_x=first,
        clean_x=p,
        clean_output=q,
        kept_x=first * r,
        kept_output=first * s,
    )


def lms(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Linear multistep over the last four slopes: crowsonkb/k-diffusion, `sample_lms`."""
    levels = schedule.spaced_levels(steps, 0.0)
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    p, q = schedule.clean(alpha, sigma)
    r, s = schedule.epsilon(alpha, sigma)
    weights = np.zeros((steps, LMS_ORDER))
    for i in range(steps):
        order = min(i + 1, LMS_ORDER)
        nodes = levels.sigmas[i - np.arange(order)]
        weights[i, :order] = _adams_bashforth(nodes, levels.sigmas[i], levels.sigmas[i + 1])
    scale = levels.alpha[1:]
    weights *= scale[:, None]
    return build(
        levels.timesteps,
        initial_scale=_initial_scale(schedule, levels),
        x=scale / alpha + weights[:, 0] * r,
        output=weights[:, 0] * s,
        past1=weights[:, 1],
        past2=weights[:, 2],
        past3=weights[:, 3],
        clean_x=p,
        clean_output=q,
        kept_x=r,
        kept_output=s,
    )


def _adams_bashforth(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Integrals from start to end of the Lagrange polynomials of the nodes, one each."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    points = (points * (end - start) + end + start) / 2
    integrals = np.empty(len(nodes))
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        values = np.prod((points[:, None] - others) / (node - others), axis=1)
        integrals[k] = (values * weights).sum() * (end - start) / 2
    return integrals


def _initial_scale(schedule: NoiseSchedule, levels: Levels) -> float:
    """With `leading` the first x has unit variance; else it has the first level's noise alone."""
    return 1.0 if schedule.timestep_spacing == "leading" else float(levels.sigma[0])


def _scale_after(levels: Levels) -> np.ndarray:
    """alpha after each step; 1 after the last, which leaves x/alpha."""
    return np.append(levels.alpha[1:-1], 1.0)
