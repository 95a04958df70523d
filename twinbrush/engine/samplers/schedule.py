"""The noise schedule of a UNet: timesteps, noise levels and what a prediction means.

This module knows no sampler: it returns the timesteps and the noise levels that they step over.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

ALPHA_BAR_FLOOR = 2.0**-24  # stands in for zero where a sampler divides by alpha_bar
KARRAS_RHO = 7.0  # arXiv:2206.00364, equation 5
BETA_SHAPE = 0.6  # arXiv:2407.12173: both parameters of the beta distribution
SIGMA_SCHEDULES = ("normal", "karras", "exponential", "beta", "sgm_uniform")

CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "sigma_schedule": SIGMA_SCHEDULES,
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
}


class Levels(NamedTuple):
    """Noise levels of a sampler that steps over sigma = sqrt((1 - alpha_bar) / alpha_bar).

    Attributes:
        timesteps: (S,); fractional where the sampler does not round them.
        sigmas: descending, (S + 1,); the last is where the trajectory ends.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray

    @property
    def alpha(self) -> np.ndarray:
        return 1 / np.sqrt(1 + self.sigmas**2)

    @property
    def sigma(self) -> np.ndarray:
        return self.sigmas * self.alpha


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule that a UNet was trained on, and the options of its scheduler.

    Attributes:
        alphas_cumprod: alpha_bar of every training timestep, (T,).
        prediction_type: what the UNet predicts: `epsilon`, `v_prediction` or `sample`.
        timestep_spacing: `leading`, `trailing` or `linspace` (arXiv:2305.08891, table 2).
        steps_offset: added to every timestep with `leading`.
        set_alpha_to_one: whether DDIM and PNDM end at alpha_bar 1 or at alpha_bar_0.
        original_inference_steps: steps of the solver that LCM and TCD were distilled with.
        timestep_scaling: LCM's factor of the timestep in its boundary condition.
        sigma_schedule: one of SIGMA_SCHEDULES; samplers without a choice ignore it.
        sigma_min, sigma_max: bounds of a sigma schedule; those of the timesteps where None.
        final_sigmas_type: `zero` or `sigma_min`: where euler, dpmpp and unipc end.
        solver_order: order of dpmpp_2m, dpmpp_2m_sde, unipc and deis.
        solver_type: `midpoint` or `heun` for dpmpp, `bh1` or `bh2` for unipc. A sampler
            takes its default for another's type, as diffusers does.
        lower_order_final: whether the last steps are of lower order.
        euler_at_final: whether the last step of dpmpp is of first order in any case.
        skip_prk_steps: whether pndm starts without Runge-Kutta steps.
        variance_type: of ddpm's noise: `fixed_small`, `fixed_small_log` or `fixed_large`.
        cosine: whether the betas are `squaredcos_cap_v2`, for which dpmpp truncates karras
            timesteps instead of rounding them.
        eta: share of noise of ddim (default 0) and tcd (default 0.3), 0 to 1.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    alphas_cumprod: tuple[float, ...]
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    sigma_schedule: str = "normal"
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    skip_prk_steps: bool = True
    variance_type: str = "fixed_small"
    cosine: bool = False
    eta: float | None = None

    def __hash__(self) -> int:
        """Counted once: caches ask for it several times a request."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            require_choice(field, getattr(self, field), allowed)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is invalid: must be between 0 and 1.")
        alpha_bar = np.asarray(self.alphas_cumprod)
        if not (len(alpha_bar) and np.all((alpha_bar >= 0) & (alpha_bar <= 1))):
            raise ValueError("alphas_cumprod is invalid: must be numbers between 0 and 1.")
        if self.prediction_type == "epsilon" and alpha_bar.min() <= 0:
            raise ValueError(
                "prediction_type='epsilon' is invalid where alpha_bar reaches 0:"
                " use v_prediction or sample."
            )
        if self.original_inference_steps > len(alpha_bar):
            raise ValueError(
                f"original_inference_steps={self.original_inference_steps} is invalid:"
                f" must be at most {len(alpha_bar)}, the number of training timesteps."
            )

    def timesteps(self, steps: int, extra: int = 0) -> np.ndarray:
        """Descending timesteps, (steps,) int64; `extra` divides the range into more parts."""
        return self.fractional_timesteps(steps, extra).round().astype(np.int64)

    def fractional_timesteps(self, steps: int, extra: int = 0) -> np.ndarray:
        """As `timesteps`, (steps,) float64, not rounded with `linspace`."""
        total = len(self.alphas_cumprod)
        parts = steps + extra
        if self.timestep_spacing == "trailing":
            spaced = np.arange(total, 0, -total / steps).round() - 1
        elif self.timestep_spacing == "leading":
            spaced = (np.arange(parts) * (total // parts))[::-1] + self.steps_offset
        else:
            spaced = np.linspace(0, total - 1, parts)[::-1]
        return spaced[:steps].astype(np.float64)

    def solver_timesteps(self, steps: int) -> np.ndarray:
        """Timesteps of LCM and TCD, (steps,) int64: those of the solver they learnt from.

        Raises:
            ValueError: there are more steps than the solver had.
        """
        total, original = len(self.alphas_cumprod), self.original_inference_steps
        if steps > original:
            raise ValueError(
                f"steps={steps} is invalid: must be at most {original},"
                " the checkpoint's original_inference_steps."
            )
        solver = np.arange(1, original + 1)[::-1] * (total // original) - 1
        return solver[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]

    def alpha_bar(self, timesteps: np.ndarray) -> np.ndarray:
        return np.asarray(self.alphas_cumprod)[timesteps]

    def alpha_bar_or_final(self, timesteps: np.ndarray) -> np.ndarray:
        """alpha_bar, and below timestep 0 where `set_alpha_to_one` says that steps end."""
        last = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0]
        return np.where(timesteps >= 0, self.alpha_bar(np.maximum(timesteps, 0)), last)

    def clean(self, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and q, with which p·x + q·model_output predicts x_0."""
        match self.prediction_type:
            case "epsilon":
                return 1 / alpha, -sigma / alpha
            case "v_prediction":
                return alpha, -sigma
            case _:
                return np.zeros_like(alpha), np.ones_like(alpha)

    def epsilon(self, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """r and s, with which r·x + s·model_output predicts the noise in x."""
        match self.prediction_type:
            case "epsilon":
                return np.zeros_like(alpha), np.ones_like(alpha)
            case "v_prediction":
                return sigma, alpha
            case _:
                return 1 / sigma, -alpha / sigma

    def sigmas(self) -> np.ndarray:
        """Noise over signal of every training timestep, (T,) float64."""
        alpha_bar = np.asarray(self.alphas_cumprod)
        alpha_bar = np.where(alpha_bar > 0, alpha_bar, ALPHA_BAR_FLOOR)
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def final_sigma(self) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else float(self.sigmas()[0])

    def spaced_levels(self, steps: int, last: float) -> Levels:
        """Levels of samplers that take fractional timesteps: euler, heun, lms."""
        timesteps = self.fractional_timesteps(steps)
        sigmas = np.interp(timesteps, np.arange(len(self.alphas_cumprod)), self.sigmas())
        if self.sigma_schedule in ("karras", "exponential", "beta"):
            table = self._rounded_sigmas().astype(np.float64)
            spaced = np.interp(timesteps, np.arange(len(table)), table)
            sigmas = self._reshape_sigmas(steps, spaced[-1], spaced[0])
            timesteps = self._timesteps_of(sigmas)
        return Levels(timesteps, np.append(sigmas, last))

    def solver_levels(self, steps: int, last: float) -> Levels:
        """Levels of samplers that take whole timesteps: dpmpp, unipc, deis.

        A sigma schedule spans all training timesteps here; `timesteps` is not yet whole.
        """
        timesteps = self.timesteps(steps, extra=1)
        sigmas = self.sigmas()[timesteps]
        if self.sigma_schedule in ("karras", "exponential", "beta"):
            table = self._rounded_sigmas()
            sigmas = self._reshape_sigmas(steps, float(table[0]), float(table[-1]))
            timesteps = self._timesteps_of(sigmas)
            if self.sigma_schedule == "karras" and not self.cosine:
                timesteps = timesteps.round()
        return Levels(np.trunc(timesteps), np.append(sigmas, last))

    def _rounded_sigmas(self) -> np.ndarray:
        """`sigmas` in float32: timesteps of a sigma schedule are truncated, so bits matter."""
        alpha_bar = np.asarray(self.alphas_cumprod, np.float32)
        alpha_bar = np.where(alpha_bar > 0, alpha_bar, np.float32(ALPHA_BAR_FLOOR))
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def _reshape_sigmas(self, steps: int, low: float, high: float) -> np.ndarray:
        low = low if self.sigma_min is None else self.sigma_min
        high = high if self.sigma_max is None else self.sigma_max
        ramp = np.linspace(0, 1, steps)
        match self.sigma_schedule:
            case "karras":
                root_low, root_high = low ** (1 / KARRAS_RHO), high ** (1 / KARRAS_RHO)
                return (root_high + ramp * (root_low - root_high)) ** KARRAS_RHO
            case "exponential":
                return np.exp(np.linspace(np.log(high), np.log(low), steps))
            case _:
                return low + beta_quantile(1 - ramp) * (high - low)

    def _timesteps_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Fractional training timesteps of noise levels, linear in log sigma."""
        table = np.log(self._rounded_sigmas())
        logs = np.log(np.maximum(sigmas, 1e-10)).astype(np.float32)
        low = np.cumsum(logs >= table[:, None], axis=0).argmax(axis=0)
        low = np.minimum(low, len(table) - 2)
        share = np.clip((table[low] - logs) / (table[low] - table[low + 1]), 0, 1)
        return (1 - share) * low + share * (low + 1)


def beta_quantile(shares: np.ndarray) -> np.ndarray:
    """Quantiles of the symmetric beta distribution of BETA_SHAPE, as many as shares.

    With t = s^(1/BETA_SHAPE) the density is smooth in s from 0, so that Gauss-Legendre
    integrates it; the distribution's upper half mirrors its lower one.
    """
    lower = np.minimum(shares, 1 - shares)
    half = _beta_mass(np.array([0.5]))[0]
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):  # bisection, to the last bit
        middle = (low + high) / 2
        below = _beta_mass(middle) / (2 * half) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = np.where(lower == 0, 0.0, (low + high) / 2)
    return np.where(shares > 0.5, 1 - quantile, quantile)


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(48)


def _beta_mass(limits: np.ndarray) -> np.ndarray:
    """Mass below each limit (0 to 0.5), up to a constant factor."""
    nodes, weights = _gauss_legendre()
    upper = limits[:, None] ** BETA_SHAPE
    points = upper * (nodes + 1) / 2
    density = (1 - points ** (1 / BETA_SHAPE)) ** (BETA_SHAPE - 1)
    return (density * weights * upper / 2).sum(axis=1)


def require_choice(field: str, value: object, allowed: tuple) -> None:
    """Raises ValueError where `value` is not among those allowed."""
    if value not in allowed:
        names = ", ".join(str(choice) for choice in allowed)
        raise ValueError(f"{field}={value!r} is invalid: must be one of {names}.")
