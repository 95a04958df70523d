"""`GenerationRequest`: the wire fields, validated once and frozen.

Every rule about what a client may ask for stands here, and is checked before any compute.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.samplers import MAX_STEPS, SAMPLERS

MAX_PROMPT_CHARACTERS = 2000
MAX_GUIDANCE_SCALE = 50.0
MAX_IMAGES = 16
MAX_SEED = 2**63 - 1
IMAGE_FORMATS = ("png", "jpeg", "raw", "png_base64")


class InvalidArgument(ValueError):
    """A field of a request is not allowed; the message names it, its value, and what is."""

    def __init__(self, name: str, value: object, allowed: str):
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        super().__init__(f"{name}={shown} is not allowed: {allowed}")


@dataclass(frozen=True)
class GenerationRequest:
    """One request as the engine takes it; image `k` is drawn from `seed + k`."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str
    num_images: int
    image_format: str
    deterministic: bool
    progress: bool
    preview_every: int

    @classmethod
    def parse(cls, fields: Mapping[str, np.ndarray | None], config: PipelineConfig):
        """A request from its tensors, one element each; absent fields are None or missing.

        Raises:
            InvalidArgument: a field is not allowed.
        """
        defaults = config.defaults
        values = {name: _single(name, tensor) for name, tensor in fields.items()}
        unknown = values.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            name = min(unknown)
            raise InvalidArgument(name, values[name], f"inputs are {', '.join(FIELDS)}")

        def value(name: str, default: Any) -> Any:
            given = values.get(name)
            return default if given is None else given

        num_images = _integer("num_images", value("num_images", 1), 1, MAX_IMAGES)
        last_seed = MAX_SEED - num_images + 1  # seed + k must be a seed too
        steps = _integer("steps", value("steps", defaults.steps), 1, MAX_STEPS)
        return cls(
            prompt=_text("prompt", values.get("prompt"), empty_allowed=False),
            negative_prompt=_text("negative_prompt", value("negative_prompt", "")),
            seed=_integer("seed", value("seed", secrets.randbelow(2**32)), 0, last_seed),
            steps=steps,
            guidance_scale=_guidance(value("guidance_scale", defaults.guidance_scale)),
            width=_side("width", value("width", config.native_side), config),
            height=_side("height", value("height", config.native_side), config),
            sampler=_choice("sampler", value("sampler", defaults.sampler), tuple(SAMPLERS)),
            num_images=num_images,
            image_format=_choice("image_format", value("image_format", "png"), IMAGE_FORMATS),
            deterministic=bool(value("deterministic", False)),
            progress=bool(value("progress", True)),
            preview_every=_integer("preview_every", value("preview_every", 0), 0, MAX_STEPS),
        )


FIELDS = tuple(GenerationRequest.__dataclass_fields__)


def _single(name: str, tensor: np.ndarray | None) -> Any:
    if tensor is None:
        return None
    if tensor.size != 1:
        raise InvalidArgument(name, list(tensor.shape), "the shape must be [1]")
    return tensor.reshape(-1)[0].item() if tensor.dtype != object else tensor.reshape(-1)[0]


def _text(name: str, value: Any, empty_allowed: bool = True) -> str:
    if value is None:
        raise InvalidArgument(name, None, "a text is required")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            allowed = f"UTF-8 text (byte {error.start} is not)"
            raise InvalidArgument(name, value, allowed) from None
    if "\0" in value:
        raise InvalidArgument(name, value, "text without NUL characters")
    if len(value) > MAX_PROMPT_CHARACTERS:
        allowed = f"at most {MAX_PROMPT_CHARACTERS} characters (it has {len(value)})"
        raise InvalidArgument(name, value, allowed)
    if not empty_allowed and not value.strip():
        raise InvalidArgument(name, value, "a text that is not empty")
    return value


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InvalidArgument(name, value, f"an integer from {lowest} to {highest}")
    return value


def _guidance(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= MAX_GUIDANCE_SCALE:
        allowed = f"a finite number from 0 to {MAX_GUIDANCE_SCALE:g}"
        raise InvalidArgument("guidance_scale", value, allowed)
    return float(value)


def _side(name: str, value: Any, config: PipelineConfig) -> int:
    step, highest = config.side_multiple, config.max_side
    if not isinstance(value, int) or value % step or not step <= value <= highest:
        allowed = f"a multiple of {step} from {step} to {highest} pixels"
        raise InvalidArgument(name, value, allowed)
    return value


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if text not in allowed:
        raise InvalidArgument(name, text, f"one of {', '.join(allowed)}")
    return text
