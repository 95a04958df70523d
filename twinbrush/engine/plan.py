"""From a request to its work: the texts to encode, the latents to denoise, and their cost.

Knows the checkpoint's settings and the request; knows nothing of threads, queues or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from twinbrush.engine.batcher import CallKey, Claim
from twinbrush.engine.capacity import Capacity, capacities
from twinbrush.engine.conditioning import Text
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.denoise import Latent
from twinbrush.engine.request import GenerationRequest
from twinbrush.engine.samplers import guidance_embedding, trajectory

UNET = "unet"


class Planner:
    """Plans requests for one checkpoint.

    Args:
        config: the checkpoint.
        max_rows: rows of a UNet call at the native size; fewer for larger pictures.
    """

    def __init__(self, config: PipelineConfig, max_rows: int):
        self._config = config
        self._capacities = capacities(config, max_rows)

    def texts(self, request: GenerationRequest) -> list[Text]:
        """The prompt and, where guidance takes two rows, the negative prompt."""
        both = [request.prompt, request.negative_prompt]
        texts = both if self._is_guided(request) else both[:1]
        return [Text(text, alone=request.deterministic) for text in texts]

    def key(self, request: GenerationRequest) -> CallKey:
        """What a request's images share calls by."""
        scale = self._config.scale_factor
        return CallKey(
            UNET, request.height // scale, request.width // scale, alone=request.deterministic
        )

    def latents(
        self, request: GenerationRequest, encoded: Mapping[str, np.ndarray]
    ) -> list[Latent]:
        """The images of a request, conditioned on what the encoders made of its texts."""
        config, key = self._config, self.key(request)
        conditioning = dict(encoded)
        rows = len(self.texts(request))
        if config.timestep_cond:
            scale = request.guidance_scale if rows == 1 else 1.0
            embedding = guidance_embedding(scale, config.timestep_cond)
            conditioning["timestep_cond"] = np.tile(embedding, (rows, 1))
        return [
            Latent(
                trajectory=trajectory(request.sampler, config.schedule, request.steps),
                conditioning=conditioning,
                guidance_scale=request.guidance_scale,
                noise=np.random.default_rng(request.seed + index),
                shape=(config.latent_channels, key.height, key.width),
            )
            for index in range(request.num_images)
        ]

    def claim(self, request: GenerationRequest, latent: Latent) -> Claim:
        """The claim of one image on UNet calls."""
        return Claim(self.key(request), [latent.rows] * latent.trajectory.steps)

    def capacity(self, key: CallKey) -> Capacity:
        """What one call of a key may hold."""
        side = max(key.height, key.width) * self._config.scale_factor
        return next(capacity for capacity in self._capacities if side <= capacity.side)

    def work(self, request: GenerationRequest) -> float:
        """The cost of a request: UNet rows times steps, in units of one row at the native size."""
        pixels = request.width * request.height / self._config.native_side**2
        return len(self.texts(request)) * request.steps * request.num_images * pixels

    def call_work(self, key: CallKey, rows: int) -> float:
        """The cost of one UNet call, in the same units."""
        pixels = key.height * key.width * self._config.scale_factor**2
        return rows * pixels / self._config.native_side**2

    def warnings(self, request: GenerationRequest) -> Iterator[str]:
        """Sentences on fields that have no effect."""
        if request.negative_prompt and not self._is_guided(request):
            yield f"negative_prompt has no effect at guidance_scale {request.guidance_scale:g}"

    def _is_guided(self, request: GenerationRequest) -> bool:
        """Whether a UNet call has a second row for the negative prompt.

        As diffusers: guidance at or below 1 uses the prompt alone. A UNet that takes the scale as
        an embedding has one row, unless there is a negative prompt.
        """
        if self._config.timestep_cond:
            return bool(request.negative_prompt)
        return request.guidance_scale > 1
