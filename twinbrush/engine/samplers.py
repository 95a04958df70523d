"""Samplers as rows of coefficients, so that one UNet call can mix samplers and step counts.

Every sampler here is linear in what it sees, so a whole trajectory is a table. One step is

    clean  = p·x + q·model_output                       (the prediction of x_0)
    x_next = a·x + b·model_output + c·previous + d·noise

where `previous` is the `clean` of the step before. Latents are variance-preserving:
x_t = sqrt(alpha_bar)·x_0 + sqrt(1 - alpha_bar)·eps. The tables are pure functions of the
noise schedule and the number of steps; this module knows nothing of models or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MAX_STEPS = 50
ALPHA_BAR_FLOOR = 2.0**-24  # stands in for zero where a sampler divides by alpha_bar


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule a UNet was trained on.

    Attributes:
        alphas_cumprod: alpha_bar of every training timestep, (T,).
        prediction_type: what the UNet predicts: `epsilon`, `v_prediction` or `sample`.
        timestep_spacing: `leading`, `trailing` or `linspace` (arXiv:2305.08891, table 2).
        steps_offset: added to every timestep with `leading`.
        set_alpha_to_one: whether DDIM's last step ends at alpha_bar 1 or at alpha_bar_0.
        original_inference_steps: steps of the solver that LCM was distilled with.
    """

    alphas_cumprod: tuple[float, ...]
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50

    def __post_init__(self) -> None:
        _one_of("prediction_type", self.prediction_type, ("epsilon", "v_prediction", "sample"))
        _one_of("timestep_spacing", self.timestep_spacing, ("leading", "trailing", "linspace"))
        if self.prediction_type == "epsilon" and min(self.alphas_cumprod) <= 0:
            raise ValueError(
                "prediction_type='epsilon' is not allowed where alpha_bar reaches 0:"
                " use v_prediction or sample"
            )

    def timesteps(self, steps: int, extra: int = 0) -> np.ndarray:
        """Descending timesteps, (steps,) int64; `extra` divides the range into more parts."""
        total = len(self.alphas_cumprod)
        parts = steps + extra
        if self.timestep_spacing == "trailing":
            spaced = np.arange(total, 0, -total / steps).round() - 1
        elif self.timestep_spacing == "leading":
            spaced = (np.arange(parts) * (total // parts))[::-1] + self.steps_offset
        else:
            spaced = np.linspace(0, total - 1, parts).round()[::-1]
        return spaced[:steps].astype(np.int64)

    def alpha_bar(self, timesteps: np.ndarray) -> np.ndarray:
        return np.asarray(self.alphas_cumprod)[timesteps]

    def clean(self, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and q, with which p·x + q·model_output predicts x_0."""
        match self.prediction_type:
            case "epsilon":
                return 1 / alpha, -sigma / alpha
            case "v_prediction":
                return alpha, -sigma
            case _:
                return np.zeros_like(alpha), np.ones_like(alpha)


@dataclass(frozen=True)
class Trajectory:
    """All steps of one image.

    Attributes:
        timesteps: what the UNet is told at each step, (S,) int64.
        table: the columns a, b, c, d, p, q of each step, (S, 6) float32.
        initial_scale: what unit noise is multiplied with before the first step.
    """

    timesteps: np.ndarray
    table: np.ndarray
    initial_scale: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def ddim(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DDIM without noise, eta = 0 (arXiv:2010.02502, equation 12)."""
    timesteps = schedule.timesteps(steps)
    alpha_bar = schedule.alpha_bar(timesteps)
    before = timesteps - len(schedule.alphas_cumprod) // steps
    last = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    alpha_bar_next = np.where(before >= 0, schedule.alpha_bar(np.maximum(before, 0)), last)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    alpha_next, sigma_next = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
    p, q = schedule.clean(alpha, sigma)
    a = alpha_next * p + sigma_next * (1 - alpha * p) / sigma
    b = alpha_next * q - sigma_next * alpha * q / sigma
    return _trajectory(timesteps, a, b, p=p, q=q)


def euler(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Euler's method on the probability-flow ODE (arXiv:2206.00364, algorithm 1, no churn)."""
    timesteps = schedule.timesteps(steps)
    alpha_bar = np.maximum(schedule.alpha_bar(timesteps), ALPHA_BAR_FLOOR)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = schedule.clean(alpha, sigma)
    ratio = np.append(sigma / alpha, 0.0)  # the ODE's own sigma: noise over signal
    alpha_next = 1 / np.sqrt(1 + ratio[1:] ** 2)
    share = ratio[1:] / ratio[:-1]  # of the way from x_0 that is left
    a = alpha_next * (share / alpha + (1 - share) * p)
    b = alpha_next * (1 - share) * q
    scale = 1.0 if schedule.timestep_spacing == "leading" else float(sigma[0])
    return _trajectory(timesteps, a, b, p=p, q=q, initial_scale=scale)


def dpmpp_2m(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DPM-Solver++(2M), data prediction (arXiv:2211.01095, algorithm 2).

    The first step is of first order, and so is the last, which ends at sigma = 0.
    """
    timesteps = schedule.timesteps(steps, extra=1)
    alpha_bar = np.maximum(schedule.alpha_bar(timesteps), ALPHA_BAR_FLOOR)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = schedule.clean(alpha, sigma)
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    half_log_snr = np.log(alpha) - np.log(sigma)  # lambda in the paper
    step = np.append(np.diff(half_log_snr), np.inf)  # h
    decay = alpha_next * (1 - np.exp(-step))
    second_order = np.zeros(steps)
    if steps > 2:
        second_order[1:-1] = 0.5 * step[1:-1] / step[:-2]
    a = sigma_next / sigma + decay * (1 + second_order) * p
    b = decay * (1 + second_order) * q
    return _trajectory(timesteps, a, b, c=-decay * second_order, p=p, q=q)


def lcm(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Multistep consistency sampling of a latent consistency model (arXiv:2310.04378, 3).

    Timesteps are picked from those of the solver that the model was distilled with.
    """
    total, original = len(schedule.alphas_cumprod), schedule.original_inference_steps
    solver = np.arange(1, original + 1)[::-1] * (total // original) - 1
    timesteps = solver[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    alpha_bar = schedule.alpha_bar(timesteps)
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    p, q = schedule.clean(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    sigma_data, scaled = 0.5, timesteps * 10.0  # boundary condition: appendix B
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    p, q = skip + out * p, out * q
    alpha_next, sigma_next = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
    return _trajectory(timesteps, alpha_next * p, alpha_next * q, d=sigma_next, p=p, q=q)


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], Trajectory]] = {
    "lcm": lcm,
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}


@lru_cache(maxsize=1024)
def trajectory(sampler: str, schedule: NoiseSchedule, steps: int) -> Trajectory:
    """The trajectory of a sampler by name.

    Raises:
        ValueError: the sampler is unknown, or `steps` is not from 1 to 50.
    """
    _one_of("sampler", sampler, tuple(SAMPLERS))
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps} is not allowed: an integer from 1 to {MAX_STEPS}")
    return SAMPLERS[sampler](schedule, steps)


def guidance_embedding(guidance_scale: float, width: int) -> np.ndarray:
    """What a guidance-distilled UNet is told as `timestep_cond`: (width,) float32.

    Sinusoids of 1000·(guidance_scale - 1) (arXiv:2210.03142, 3; the layout of diffusers).
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * -(np.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale - 1.0) * frequencies
    embedding = np.zeros(width, np.float32)
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding


def _trajectory(
    timesteps: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    p: np.ndarray,
    q: np.ndarray,
    c: np.ndarray | float = 0.0,
    d: np.ndarray | float = 0.0,
    initial_scale: float = 1.0,
) -> Trajectory:
    columns = np.broadcast_arrays(a, b, c, d, p, q)
    return Trajectory(timesteps, np.stack(columns, axis=1).astype(np.float32), initial_scale)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not allowed: one of {', '.join(allowed)}")
