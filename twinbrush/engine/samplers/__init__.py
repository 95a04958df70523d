"""Samplers as rows of coefficients, so that one UNet call can mix samplers and step counts.

A trajectory is a pure function of a sampler's name, the noise schedule and the number of steps.
`rows` says what a row means and applies it; nothing here knows of models or requests. Every
sampler is that of diffusers' scheduler of the same name, at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from twinbrush.engine.samplers.first_order import ddim, ddpm, lcm, tcd
from twinbrush.engine.samplers.multistep import deis, dpmpp_2m, dpmpp_2m_sde
from twinbrush.engine.samplers.pndm import pndm
from twinbrush.engine.samplers.rows import COLUMNS, Latent, Trajectory, advance
from twinbrush.engine.samplers.schedule import SIGMA_SCHEDULES, NoiseSchedule, require_choice
from twinbrush.engine.samplers.sigma_space import euler, euler_a, heun, lms
from twinbrush.engine.samplers.unipc import unipc

MAX_STEPS = 50
SAMPLERS: dict[str, Callable[[NoiseSchedule, int], Trajectory]] = {
    "lcm": lcm,
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "ddpm": ddpm,
    "euler_a": euler_a,
    "heun": heun,
    "lms": lms,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "deis": deis,
    "pndm": pndm,
    "tcd": tcd,
}
FRACTIONAL = ("euler", "euler_a", "heun", "lms")  # with linspace or a sigma schedule
RESHAPABLE = ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis")
DISTILLED = ("lcm", "tcd")  # their timesteps are the distillation's, not spaced
STOCHASTIC = ("ddim", "tcd")  # take eta

__all__ = [
    "COLUMNS",
    "FRACTIONAL",
    "MAX_STEPS",
    "SAMPLERS",
    "SIGMA_SCHEDULES",
    "Latent",
    "NoiseSchedule",
    "Trajectory",
    "advance",
    "ddim",
    "trajectory",
]


@lru_cache(maxsize=1024)
def trajectory(
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    sigma_schedule: str | None = None,
    eta: float | None = None,
) -> Trajectory:
    """The trajectory of a sampler by name.

    Args:
        sigma_schedule: one of SIGMA_SCHEDULES; by default the checkpoint's, where the sampler
            has a choice. `sgm_uniform` is the timestep spacing `trailing`.
        eta: share of noise, of ddim (default 0) and tcd (default 0.3).

    Raises:
        ValueError: the sampler is unknown, `steps` is not from 1 to 50 or is more than the
            sampler allows, or the sampler does not take the sigma schedule or eta.
    """
    require_choice("sampler", sampler, tuple(SAMPLERS))
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps} is invalid: must be between 1 and {MAX_STEPS}.")
    if eta is not None:
        if sampler not in STOCHASTIC:
            names = " and ".join(STOCHASTIC)
            raise ValueError(f"eta={eta} is invalid for sampler {sampler!r}: only {names} take it.")
        schedule = replace(schedule, eta=eta)
    return SAMPLERS[sampler](_with_sigmas(sampler, schedule, sigma_schedule), steps)


def _with_sigmas(
    sampler: str, schedule: NoiseSchedule, sigma_schedule: str | None
) -> NoiseSchedule:
    """The schedule with the sigma schedule that the sampler is to use."""
    if sampler in RESHAPABLE:
        allowed = SIGMA_SCHEDULES
    else:
        allowed = ("normal",) if sampler in DISTILLED else ("normal", "sgm_uniform")
    if sigma_schedule is not None and sigma_schedule not in allowed:
        require_choice("sigma_schedule", sigma_schedule, SIGMA_SCHEDULES)
        names = ", ".join(allowed)
        raise ValueError(
            f"sigma_schedule={sigma_schedule!r} is invalid for sampler {sampler!r}:"
            f" must be one of {names}."
        )
    chosen = sigma_schedule or schedule.sigma_schedule
    if chosen not in allowed:
        chosen = "normal"
    if chosen == "sgm_uniform":
        return replace(schedule, sigma_schedule="normal", timestep_spacing="trailing")
    return replace(schedule, sigma_schedule=chosen)
