"""PNDM: linear multistep over raw predictions, with or without Runge-Kutta steps at the start.

arXiv:2202.09778. Transfer F(x, t -> t', output) is DDIM's step, written for the output.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from twinbrush.engine.samplers.rows import COLUMNS, Trajectory, build
from twinbrush.engine.samplers.schedule import ALPHA_BAR_FLOOR, NoiseSchedule

# Weights of this and the last three outputs (Adams-Bashforth), by how many there are.
MULTISTEP = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
RUNGE_KUTTA_STEPS = 3
Row = dict[str, float]


def pndm(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """PNDM (algorithm 2), or PLMS where `skip_prk_steps`.

    PLMS makes its first step twice, the second time from the anchor by the mean of both
    outputs: steps + 1 calls. With Runge-Kutta, each of the first three steps has four calls:
    steps + 9.

    Raises:
        ValueError: the model predicts x_0, or there are too few steps for Runge-Kutta.
    """
    if schedule.prediction_type == "sample":
        raise ValueError("prediction_type='sample' is invalid for sampler 'pndm'.")
    timesteps = schedule.timesteps(steps)
    if schedule.skip_prk_steps:
        return _plms(schedule, timesteps)
    if steps <= RUNGE_KUTTA_STEPS:
        raise ValueError(
            f"steps={steps} is invalid: sampler 'pndm' with skip_prk_steps=False"
            f" requires at least {RUNGE_KUTTA_STEPS + 1}."
        )
    return _runge_kutta_and_plms(schedule, timesteps)


def _plms(schedule: NoiseSchedule, timesteps: np.ndarray) -> Trajectory:
    stride = len(schedule.alphas_cumprod) // len(timesteps)
    first = timesteps[0]
    at = [first]
    rows = [_multistep_row(schedule, first, first - stride, 1) | {"anchor_x": 1.0}]
    for i, t in enumerate(timesteps[1:]):
        if i == 0:  # the first step again, whose output is not kept
            of_x, of_output = _transfer(schedule, t + stride, t)
            rows.append({"anchor": of_x, "output": of_output / 2, "past1": of_output / 2})
            at.append(t)
        rows.append(_multistep_row(schedule, t, t - stride, min(i + 2, 4)))
        at.append(t)
    ends_step = np.ones(len(at), bool)
    ends_step[0] = len(at) == 1
    return _build(schedule, at, rows, ends_step)


def _runge_kutta_and_plms(schedule: NoiseSchedule, timesteps: np.ndarray) -> Trajectory:
    stride = len(schedule.alphas_cumprod) // len(timesteps)
    at, rows = [], []
    for t, following in pairwise(timesteps[: RUNGE_KUTTA_STEPS + 1]):
        middle = following + stride // 2
        at += [t, middle, middle, following]
        rows += _runge_kutta_rows(schedule, t, middle, following, stride // 2)
    ends_step = [False, False, False, True] * RUNGE_KUTTA_STEPS
    for t in timesteps[RUNGE_KUTTA_STEPS:]:
        at.append(t)
        rows.append(_multistep_row(schedule, t, t - stride, 4))
        ends_step.append(True)
    return _build(schedule, at, rows, np.array(ends_step))


def _runge_kutta_rows(
    schedule: NoiseSchedule, t: int, middle: int, following: int, half: int
) -> list[Row]:
    """The four calls of a step from the anchor A, with outputs m0 to m3.

    Only m0 is kept. The mean of the outputs needs m1 and m2 too, but each went into the x
    after its call, x = of_x·A + of_output·m, from which a later row takes it back: the third
    row makes the anchor A's and m1's part of the step's end, the fourth takes m2 from x.
    """
    first, second = _transfer(schedule, t, t - half), _transfer(schedule, t, middle)
    third = _transfer(schedule, t, following)
    of_x, of_output = third
    of_m1 = of_output / 3 / second[1]
    of_m2 = 1 / 3  # m2 went through `third` itself
    return [
        {"x": first[0], "output": first[1], "anchor_x": 1.0, "kept_output": 1.0},
        {"anchor": second[0], "output": second[1]},
        {
            "anchor": of_x,
            "output": of_output,
            "anchor_x": of_m1,
            "anchor_anchor": of_x - of_m1 * second[0] - of_m2 * of_x,
        },
        {"x": of_m2, "anchor": 1.0, "past1": of_output / 6, "output": of_output / 6},
    ]


def _multistep_row(schedule: NoiseSchedule, t: int, following: int, count: int) -> Row:
    of_x, of_output = _transfer(schedule, t, following)
    names = ("output", "past1", "past2", "past3")
    row = {name: of_output * weight for name, weight in zip(names, MULTISTEP[count], strict=False)}
    return row | {"x": of_x, "kept_output": 1.0}


def _transfer(schedule: NoiseSchedule, t: int, following: int) -> tuple[float, float]:
    """Weights of x and of the output in the step from timestep t (equation 9)."""
    bars = schedule.alpha_bar_or_final(np.array([t, following]))
    now, after = np.maximum(bars, ALPHA_BAR_FLOOR)
    of_x = np.sqrt(after / now)
    of_noise = -(after - now) / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
    r, s = schedule.epsilon(np.sqrt(now), np.sqrt(1 - now))
    return float(of_x + of_noise * r), float(of_noise * s)


def _build(
    schedule: NoiseSchedule, at: list[int], rows: list[Row], ends_step: np.ndarray
) -> Trajectory:
    timesteps = np.array(at)
    alpha_bar = np.maximum(schedule.alpha_bar(timesteps), ALPHA_BAR_FLOOR)
    p, q = schedule.clean(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    columns: dict[str, Any] = {
        name: np.array([row.get(name, 0.0) for row in rows]) for name in COLUMNS
    }
    columns |= {"clean_x": p, "clean_output": q}
    return build(timesteps, ends_step=ends_step, **columns)
