"""Classifier-free guidance: when an image needs it, and what it does to predictions.

This module knows arrays and numbers; the engine decides which rows a UNet call has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Guidance:
    """How strongly an image follows its prompt.

    Attributes:
        scale: weight of the prompt's prediction against the negative one.
        rescale: strength of `rescale`, 0 to 1.
        start, end: the interval of the steps, as shares, in which guidance applies.
    """

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def applies(self, step_share: float) -> bool:
        """Whether guidance applies to a step (arXiv:2404.07724).

        Args:
            step_share: steps done before this one, as a share of all: from 0 to below 1.
        """
        return self.start <= step_share < self.end


def needs_negative(guidance_scale: float) -> bool:
    """Whether an image has a second row; at or below 1 the prompt alone guides (diffusers)."""
    return guidance_scale > 1


def rescale(guided: np.ndarray, conditional: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Brings guided predictions towards the prompt's own standard deviation.

    arXiv:2305.08891, section 3.4, equations 15 and 16.

    Args:
        guided: predictions after guidance, (J, C, h, w) float32.
        conditional: the prompt's own predictions, (J, C, h, w) float32.
        strength: share of the rescaled prediction (phi), (J,), 0 to 1; 0 changes nothing.
    """
    axes = tuple(range(1, guided.ndim))
    target, spread = conditional.std(axis=axes), guided.std(axis=axes)
    ratio = np.divide(target, spread, out=np.ones_like(target), where=spread > 0)
    factor = np.where(strength > 0, 1 + strength * (ratio - 1), 1.0).astype(guided.dtype)
    return guided * factor.reshape(-1, *[1] * len(axes))


def guidance_embedding(guidance_scale: float, width: int) -> np.ndarray:
    """The `timestep_cond` of a guidance-distilled UNet, (width,) float32.

    Sinusoids of 1000·(guidance_scale - 1) (arXiv:2210.03142, 3; the layout of diffusers).
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * -(np.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale - 1.0) * frequencies
    embedding = np.zeros(width, np.float32)
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding
