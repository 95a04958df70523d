"""Exponential multistep solvers: dpmpp_2m, dpmpp_2m_sde, deis.

They look back on up to two predictions: of x_0 (dpmpp) or of the noise (deis).
"""

from __future__ import annotations

import numpy as np

from twinbrush.engine.samplers.rows import Trajectory, build
from twinbrush.engine.samplers.schedule import NoiseSchedule

FEW_STEPS = 15  # below this many steps, `lower_order_final` lowers the order of the last two


def dpmpp_2m(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DPM-Solver++, data prediction, order 1 to 3 (arXiv:2211.01095, algorithm 2)."""
    return _dpmpp(schedule, steps, stochastic=False)


def dpmpp_2m_sde(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """SDE-DPM-Solver++, data prediction (arXiv:2211.01095, 5); one draw of noise a step."""
    return _dpmpp(schedule, steps, stochastic=True)


def deis(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DEIS in log rho, order 1 to 3 (arXiv:2204.13902, 3.3: tAB-DEIS over rho = sigma).

    It ends at the training schedule's lowest noise, or repeats the last of a sigma schedule.
    """
    levels = schedule.solver_levels(steps, float(schedule.sigmas()[0]))
    if schedule.sigma_schedule in ("karras", "exponential", "beta"):
        levels.sigmas[-1] = levels.sigmas[-2]
    alpha, sigma = levels.alpha, levels.sigma
    p, q = schedule.clean(alpha[:-1], sigma[:-1])
    r, s = schedule.epsilon(alpha[:-1], sigma[:-1])
    weights = np.zeros((steps, 3))
    for i in range(steps):
        nodes = np.log(levels.sigmas[i - np.arange(_order(schedule, steps, i))])
        weights[i, : len(nodes)] = _integrate_lagrange(
            nodes, levels.sigmas[i], levels.sigmas[i + 1]
        )
    weights *= alpha[1:, None]
    return build(
        levels.timesteps,
        x=alpha[1:] / alpha[:-1] + weights[:, 0] * r,
        output=weights[:, 0] * s,
        past1=weights[:, 1],
        past2=weights[:, 2],
        clean_x=p,
        clean_output=q,
        kept_x=r,
        kept_output=s,
    )


def _dpmpp(schedule: NoiseSchedule, steps: int, stochastic: bool) -> Trajectory:
    levels = schedule.solver_levels(steps, schedule.final_sigma())
    alpha, sigma = levels.alpha, levels.sigma
    p, q = schedule.clean(alpha[:-1], sigma[:-1])
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(levels.sigmas))  # steps of lambda = log(alpha / sigma)
    span = 2 * h if stochastic else h
    decay = np.exp(-span)
    of_x = sigma[1:] / sigma[:-1] * (np.exp(-h) if stochastic else 1.0)
    weights = np.zeros((steps, 3))
    for i in range(steps):
        order = _order(schedule, steps, i, schedule.euler_at_final or levels.sigmas[-1] == 0)
        weights[i] = alpha[i + 1] * _dpmpp_weights(schedule, order, h[: i + 1], span[i], stochastic)
    return build(
        levels.timesteps,
        x=of_x + weights[:, 0] * p,
        output=weights[:, 0] * q,
        past1=weights[:, 1],
        past2=weights[:, 2],
        noise=sigma[1:] * np.sqrt(np.maximum(1 - decay, 0)) if stochastic else 0.0,
        clean_x=p,
        clean_output=q,
        kept_x=p,
        kept_output=q,
    )


def _dpmpp_weights(
    schedule: NoiseSchedule, order: int, h: np.ndarray, span: float, stochastic: bool
) -> np.ndarray:
    """Weights of this and the last two predictions of x_0, (3,), for alpha = 1.

    Args:
        h: steps of lambda up to this one.
        span: the exponent of this step's decay: h, or 2h of the SDE.
    """
    gain = 1 - np.exp(-span)
    value = np.array([gain, 0.0, 0.0])  # D0
    if order == 1:
        return value
    back = np.array([1.0, -1.0, 0.0]) * (h[-1] / h[-2])  # D1_0
    # The SDE's heun solver has + where the ODE's Taylor coefficient would give it -gain/span.
    slope = 1 - gain / span
    if order == 2:
        return value + back * (0.5 * gain if schedule.solver_type != "heun" else slope)
    r0, r1 = h[-2] / h[-1], h[-3] / h[-1]
    older = np.array([0.0, 1.0, -1.0]) / r1  # D1_1
    first = back + r0 / (r0 + r1) * (back - older)
    second = (back - older) / (r0 + r1)
    curve = (gain - span) / span**2 + (-0.5 if stochastic else 0.5)
    return value + slope * first + curve * second


def _order(schedule: NoiseSchedule, steps: int, i: int, first_order_last: bool = False) -> int:
    """Order of step i: as many predictions as there are, fewer in the last two steps."""
    order = min(schedule.solver_order, i + 1)
    lowered = schedule.lower_order_final and steps < FEW_STEPS
    if i == steps - 1 and (lowered or first_order_last):
        return 1
    return min(order, 2) if i == steps - 2 and lowered else order


def _integrate_lagrange(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Integrals over rho from start to end of Lagrange polynomials in log rho, one a node.

    The antiderivatives of 1, u and u² for u = log rho are rho·(1, u - 1, u² - 2u + 2).
    """

    def moments(rho: float) -> np.ndarray:
        u = np.log(rho)
        return rho * np.array([1.0, u - 1, u**2 - 2 * u + 2])

    powers = moments(end) - moments(start)
    vandermonde = np.vander(nodes, increasing=True)  # (nodes, powers)
    return np.linalg.solve(vandermonde.T, powers[: len(nodes)])
