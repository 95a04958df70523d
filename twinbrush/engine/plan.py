"""From a request to its work: the texts to encode, the latents to denoise, and their cost.

Knows the checkpoint's settings and the request; knows nothing of threads, queues or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from twinbrush.engine.batcher import CallKey, Claim
from twinbrush.engine.capacity import LEAST_ROWS, capacities, decoder_pictures
from twinbrush.engine.conditioning import Text
from twinbrush.engine.config import LORA_SCALE, TIME_IDS, TOKENS, PipelineConfig
from twinbrush.engine.denoise import Painting
from twinbrush.engine.guidance import Guidance, guidance_embedding, needs_negative
from twinbrush.engine.loras import parse_loras
from twinbrush.engine.memory import DeviceMemory, MemoryBudget
from twinbrush.engine.request import FIELDS, GenerationRequest, InvalidArgument
from twinbrush.engine.samplers import Trajectory, trajectory

UNET = "unet"
PRIORITY_WEIGHTS = {"low": 0.25, "normal": 1.0, "high": 4.0}


class Planner:
    """Plans requests for one checkpoint.

    Args:
        config: the checkpoint.
        max_rows: rows of a UNet call at the native size; fewer for larger pictures.
        device: memory that the networks may take, or None where that is not bounded; it has an
            effect where an export has measured what they take.
    """

    def __init__(self, config: PipelineConfig, max_rows: int, device: DeviceMemory | None = None):
        self._config = config
        self._capacities = capacities(config, max_rows)
        self._memory = None
        if device is not None and config.memory is not None:
            native = config.cells(config.native_width, config.native_height)
            side = config.max_side // config.scale_factor
            pixels = config.max_pixels or config.max_side**2
            largest = max(native, min(side**2, pixels // config.scale_factor**2))
            least = 1 if config.timestep_cond else LEAST_ROWS
            self._memory = MemoryBudget(config.memory, device, native, largest, least)
        self._encoders_take_loras = any(encoder.takes_loras for encoder in config.encoders)

    def texts(self, request: GenerationRequest) -> list[Text]:
        """The prompt and, where guidance takes two rows, the negative prompt."""
        both = [request.prompt, request.negative_prompt]
        texts = both if self._is_guided(request) else both[:1]
        scales = self._lora_scales(request) if self._encoders_take_loras else ()
        return [Text(text, request.deterministic, request.syntax, scales) for text in texts]

    def key(self, request: GenerationRequest) -> CallKey:
        """What a request's images share calls by, as far as its fields say it."""
        scale = self._config.scale_factor
        return CallKey(
            UNET, request.height // scale, request.width // scale, alone=request.deterministic
        )

    def paintings(self, request: GenerationRequest) -> list[Painting]:
        """The images of a request, without their conditioning."""
        key = self.key(request)
        return [
            Painting(
                trajectory=self._trajectory(request),
                conditioning={},
                guidance=self._guidance(request),
                noise=np.random.default_rng(request.seed + index),
                shape=(self._config.latent_channels, key.height, key.width),
            )
            for index in range(request.num_images)
        ]

    def conditioning(
        self, request: GenerationRequest, encoded: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What the UNet takes beside latents, from what the encoders made of a request's texts."""
        config = self._config
        conditioning = dict(encoded)
        rows = len(self.texts(request))
        if config.timestep_cond:
            scale = request.guidance_scale if rows == 1 else 1.0
            embedding = guidance_embedding(scale, config.timestep_cond)
            conditioning["timestep_cond"] = np.tile(embedding, (rows, 1))
        if rows == 2 and config.zeros_for_empty_negative and not request.negative_prompt:
            for name, tensor in encoded.items():
                conditioning[name] = np.stack([tensor[0], np.zeros_like(tensor[0])])
        if config.takes_sizes:
            sizes = np.array(request.time_ids, np.float32)
            conditioning[TIME_IDS] = np.tile(sizes, (rows, 1))
        if LORA_SCALE in config.unet_inputs:
            scales = np.array(self._lora_scales(request), np.float32)
            conditioning[LORA_SCALE] = np.tile(scales, (rows, 1))
        return conditioning

    def claim(self, request: GenerationRequest, painting: Painting) -> Claim:
        """The claim of one image on UNet calls."""
        rows = [painting.rows_at(call) for call in range(painting.trajectory.calls)]
        key = replace(self.key(request), tokens=painting.conditioning[TOKENS].shape[1])
        return Claim(key, rows, PRIORITY_WEIGHTS[request.priority])

    def rows(self, key: CallKey) -> int:
        """Rows that one UNet call of a key may have."""
        side = max(key.height, key.width) * self._config.scale_factor
        most = next(capacity.rows for capacity in self._capacities if side <= capacity.side)
        return most if self._memory is None else min(most, self._memory.rows(key.cells))

    def pictures(self, key: CallKey, rows: int) -> int:
        """Pictures that one decoder call may have, where a UNet call of the key has `rows`."""
        most = decoder_pictures(rows)
        return most if self._memory is None else min(most, self._memory.pictures(key.cells))

    @property
    def memory(self) -> MemoryBudget | None:
        """What bounds the memory of calls, if anything does."""
        return self._memory

    def check_memory(self, request: GenerationRequest) -> None:
        """Refuses a request whose images do not fit into memory one by one.

        Raises:
            InvalidArgument: with its size, what it needs and what there is.
        """
        memory, key, rows = self._memory, self.key(request), len(self.texts(request))
        if memory is None or memory.fits(key.cells, rows):
            return
        needed = memory.networks.image(key.cells, rows) / 1e9
        raise InvalidArgument.worded(
            f"width={request.width} and height={request.height} need about {needed:.1f} GB of"
            f" memory, of which the server has {memory.budget / 1e9:.1f} GB: ask for a smaller"
            " picture, or raise memory_mb of text_to_image_stream where the machine has more."
        )

    def work(self, request: GenerationRequest) -> float:
        """The cost of a request in UNet rows at the native size."""
        calls = self._trajectory(request).calls
        rows = len(self.texts(request)) * calls * request.num_images
        return self.call_work(self.key(request), rows)

    def call_work(self, key: CallKey, rows: int) -> float:
        """The cost of one UNet call, in the same units."""
        pixels = key.height * key.width * self._config.scale_factor**2
        return rows * pixels / self._config.native_side**2

    def warnings(self, request: GenerationRequest) -> Iterator[str]:
        """Sentences on fields that have no effect."""
        if request.negative_prompt and not self._is_guided(request):
            yield f"negative_prompt has no effect at guidance_scale {request.guidance_scale:g}"
        if not self._is_guided(request):
            for name in ("guidance_rescale", "guidance_start", "guidance_end"):
                if getattr(request, name) != FIELDS[name].default:
                    yield f"{name} has no effect without a negative prompt's row"

    def _lora_scales(self, request: GenerationRequest) -> tuple[float, ...]:
        return parse_loras(request.lora or "", self._config.loras)

    @staticmethod
    def _guidance(request: GenerationRequest) -> Guidance:
        return Guidance(
            request.guidance_scale, request.guidance_rescale,
            request.guidance_start, request.guidance_end,
        )  # fmt: skip

    def _trajectory(self, request: GenerationRequest) -> Trajectory:
        return trajectory(
            request.sampler, self._config.schedule, request.steps,
            request.chosen_sigma_schedule, request.chosen_eta,
        )  # fmt: skip

    def _is_guided(self, request: GenerationRequest) -> bool:
        """Whether a UNet call has a second row for the negative prompt.

        As diffusers: guidance at or below 1 uses the prompt alone. A UNet that takes the scale as
        an embedding has one row, unless there is a negative prompt.
        """
        if self._config.timestep_cond:
            return bool(request.negative_prompt)
        return needs_negative(request.guidance_scale)
