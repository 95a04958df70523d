"""Samplers that step from one alpha_bar to the next: ddim, ddpm, lcm, tcd."""

from __future__ import annotations

import numpy as np

from twinbrush.engine.samplers.rows import Trajectory, build
from twinbrush.engine.samplers.schedule import NoiseSchedule

TCD_ETA = 0.3


def ddim(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DDIM (arXiv:2010.02502, equation 12), with `schedule.eta` of equation 16, or 0."""
    timesteps = schedule.timesteps(steps)
    alpha_bar = schedule.alpha_bar(timesteps)
    before = timesteps - len(schedule.alphas_cumprod) // steps
    alpha_bar_next = schedule.alpha_bar_or_final(before)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    share = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    noise = (schedule.eta or 0.0) * np.sqrt(share)
    alpha_next = np.sqrt(alpha_bar_next)
    sigma_next = np.sqrt(np.maximum(1 - alpha_bar_next - noise**2, 0))
    p, q = schedule.clean(alpha, sigma)
    x = alpha_next * p + sigma_next * (1 - alpha * p) / sigma
    output = alpha_next * q - sigma_next * alpha * q / sigma
    return build(timesteps, x=x, output=output, noise=noise, clean_x=p, clean_output=q)


def ddpm(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Ancestral sampling of the diffusion's posterior (arXiv:2006.11239, equations 6 and 7)."""
    timesteps = schedule.timesteps(steps)
    alpha_bar = schedule.alpha_bar(timesteps)
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    alpha_step = alpha_bar / alpha_bar_next
    beta_step = 1 - alpha_step
    p, q = schedule.clean(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    of_clean = np.sqrt(alpha_bar_next) * beta_step / (1 - alpha_bar)
    of_x = np.sqrt(alpha_step) * (1 - alpha_bar_next) / (1 - alpha_bar)
    variance = beta_step
    if schedule.variance_type != "fixed_large":
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * beta_step
    noise = np.where(timesteps > 0, np.sqrt(variance), 0.0)
    return build(
        timesteps,
        x=of_x + of_clean * p,
        output=of_clean * q,
        noise=noise,
        clean_x=p,
        clean_output=q,
    )


def lcm(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Multistep consistency sampling of a latent consistency model (arXiv:2310.04378, 3).

    Timesteps are picked from those of the solver that the model was distilled with.

    Raises:
        ValueError: there are more steps than the solver had.
    """
    timesteps = schedule.solver_timesteps(steps)
    alpha_bar = schedule.alpha_bar(timesteps)
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    p, q = schedule.clean(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    sigma_data, scaled = 0.5, timesteps * schedule.timestep_scaling  # appendix B
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    p, q = skip + out * p, out * q
    alpha_next, noise = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
    return build(
        timesteps,
        x=alpha_next * p,
        output=alpha_next * q,
        noise=noise,
        clean_x=p,
        clean_output=q,
    )


def tcd(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Trajectory consistency distillation, strategic stochastic sampling.

    arXiv:2402.19159, algorithm 4; `schedule.eta` is its gamma, by default 0.3. The last step
    ends at timestep 0.

    Raises:
        ValueError: there are more steps than the solver that the model was distilled with had.
    """
    eta = TCD_ETA if schedule.eta is None else schedule.eta
    timesteps = schedule.solver_timesteps(steps)
    following = np.append(timesteps[1:], 0)
    # float32 as diffusers, so that floor falls on the same timestep
    middle = np.floor(np.float32(1 - eta) * following.astype(np.float32)).astype(np.int64)
    alpha_bar, alpha_bar_next = schedule.alpha_bar(timesteps), schedule.alpha_bar(following)
    alpha_bar_middle = schedule.alpha_bar(middle)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = schedule.clean(alpha, sigma)
    r, s = schedule.epsilon(alpha, sigma)
    alpha_middle, sigma_middle = np.sqrt(alpha_bar_middle), np.sqrt(1 - alpha_bar_middle)
    ratio = alpha_bar_next / alpha_bar_middle
    ratio[-1] = 1.0  # the last step adds no noise
    scale = np.sqrt(ratio)
    return build(
        timesteps,
        x=scale * (alpha_middle * p + sigma_middle * r),
        output=scale * (alpha_middle * q + sigma_middle * s),
        noise=np.sqrt(1 - ratio),
        clean_x=p,
        clean_output=q,
    )
