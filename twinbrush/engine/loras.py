"""LoRAs that a request switches on: `"ink:0.8,film"`. Knows their names and scales, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.fields import InvalidArgument, decoded

MAX_SCALE = 10.0  # of either sign
MAX_BYTES = 2000


def parse_loras(text: str, names: Sequence[str]) -> tuple[float, ...]:
    """The scale of each LoRA of a checkpoint, 0 for those that are not named.

    Args:
        text: names with commas, each with `:SCALE` behind it or with scale 1; may be empty.
        names: of the checkpoint's LoRAs.

    Raises:
        ValueError: a name is unknown or comes twice, or a scale is not allowed.
    """
    scales: dict[str, float] = {}
    for entry in text.split(",") if text.strip() else ():
        name, colon, number = (word.strip() for word in entry.partition(":"))
        if name not in names:
            raise ValueError(f"{name[:40]!r} is no LoRA of the checkpoint: must be one of"
                             f" {', '.join(names)}")  # fmt: skip
        if name in scales:
            raise ValueError(f"{name!r} must come once")
        scales[name] = _scale(name, number if colon else "1")
    return tuple(scales.get(name, 0.0) for name in names)


def _scale(name: str, text: str) -> float:
    try:
        scale = float(text)
        good = abs(scale) <= MAX_SCALE
    except ValueError:
        scale, good = 0.0, False
    if not good:
        allowed = f"must be a number between -{MAX_SCALE:g} and {MAX_SCALE:g}"
        raise ValueError(f"the scale of {name!r} {allowed}")
    return scale


@dataclass(frozen=True)
class LoraChoice:
    """Names of the checkpoint's LoRAs, with scales."""

    max_bytes: int = MAX_BYTES

    def allowed(self) -> str:
        return f"`NAME:SCALE`, with commas; scales of -{MAX_SCALE:g} to {MAX_SCALE:g}"

    def check(self, name: str, value: Any, config: PipelineConfig) -> str:
        text = decoded(name, value)
        if not config.loras:
            allowed = f"{config.checkpoint} has no LoRAs; `python -m export --lora-set` adds some"
            raise InvalidArgument(name, text, allowed)
        try:
            parse_loras(text, config.loras)
        except ValueError as error:
            raise InvalidArgument(name, text, str(error)) from None
        return text
