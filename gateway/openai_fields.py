"""The body of OpenAI's image generation: its fields, and what they ask of a server.

Fields of the current API and Twinbrush's own. Knows no routes.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.errors import ApiError, invalid
from twinbrush_client import ServerInfo

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
WORD = re.compile(r"\w+|[^\w\s]")
MAX_STEPS = 50
# Steps of each quality, as a multiple of the checkpoint's own.
QUALITIES = {"low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 3.0, "max": 4.0}
QUALITY_OF = {None: "medium", "auto": "medium", "standard": "medium", "hd": "high"}
# What a server calls a field, and what this door does.
NAMES = {"width": "size", "height": "size", "num_images": "n", "image_format": "output_format",
         "image_quality": "output_compression", "preview_every": "partial_images"}  # fmt: skip
NOT_SERVED = ("frame_count", "frame_duration_ms", "svg")
EXAMPLE = "a large blue ring on a brown background"
MAX_TEXT = 2000  # characters of a text, as of a server's


class GenerationBody(BaseModel):
    """What `POST /v1/images/generations` takes. A field that is null is a field left out."""

    model_config = ConfigDict(
        extra="forbid", strict=True, title="ImageGenerationRequest",
        json_schema_extra={"examples": [{"prompt": EXAMPLE, "n": 1, "response_format": "url"}]},
    )  # fmt: skip

    prompt: str = Field(
        min_length=1, max_length=MAX_TEXT, description="What to paint.", examples=[EXAMPLE]
    )
    model: str | None = Field(
        None, max_length=256, description="A checkpoint of /v1/models; the first one by default."
    )
    n: int | None = Field(None, ge=1, le=16, description="Number of images; 1 by default.")
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$",
        description="WIDTHxHEIGHT, or auto for the checkpoint's native size.",
    )  # fmt: skip
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json by default. A url is signed, expires, and needs no key."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="png by default."
    )
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp; the format's own by default."
    )
    background: Literal["opaque", "auto"] | None = Field(
        None, description="Pictures are opaque; transparent ones are not served."
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = (
        Field(None, description="Half, once, 2, 3 or 4 times the checkpoint's steps; see steps.")
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Rough looks at each image while it is painted; of stream."
    )
    moderation: Literal["low", "auto"] | None = Field(None, description="Has no effect.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Has no effect.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Has no effect.")
    user: str | None = Field(None, max_length=512, description="Has no effect.")
    safety_identifier: str | None = Field(
        None, max_length=512, description="Has no effect; the answer repeats it."
    )
    # Twinbrush's own; the openai package sends them by `extra_body`.
    seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="Image k is drawn from seed + k; random by default."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0, le=50, allow_inf_nan=False, description="How closely to follow the prompt."
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_TEXT, description="What guidance leads away from."
    )
    prompt_syntax: Literal["plain", "a1111"] | None = Field(
        None, description="Whether brackets in prompts are weights; plain by default."
    )
    lora: str | None = Field(
        None, max_length=2000, description="LoRAs of the checkpoint and their scales, NAME:SCALE."
    )
    sampler: str | None = Field(None, max_length=64, description="A sampler of the server's.")
    priority: Literal["low", "normal", "high"] | None = Field(
        None, description="Weight among the live requests."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None or k not in NOT_SERVED}

    def check(self) -> None:
        """What single fields cannot tell.

        Raises:
            ApiError: two fields contradict each other.
        """
        if self.partial_images and not self.stream:
            raise invalid("partial_images", self.partial_images, "needs stream=true")
        if self.stream and self.response_format == "url":
            raise invalid("response_format", "url", "must be b64_json with stream=true")
        if self.output_compression not in (None, 100) and self.image_format == "png":
            allowed = "is of output_format jpeg and webp; png loses nothing"
            raise invalid("output_compression", self.output_compression, allowed)

    @property
    def image_format(self) -> str:
        return self.output_format or "png"

    @property
    def chosen_quality(self) -> str:
        return QUALITY_OF.get(self.quality) or str(self.quality)

    @property
    def identifier(self) -> str | None:
        return self.safety_identifier or self.user or None

    def fields(self, info: ServerInfo) -> dict[str, Any]:
        """The fields of a server's request; those that are None take its defaults."""
        width, height = self._size(info)
        compression = self.output_compression
        steps = self.steps
        if steps is None:
            wanted = info.defaults["steps"] * QUALITIES[self.chosen_quality]
            steps = min(MAX_STEPS, max(1, round(wanted)))
        return {
            "num_images": self.n or 1,
            "width": width,
            "height": height,
            "steps": steps,
            "image_format": self.image_format,
            "image_quality": None if compression is None else max(1, compression),
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "prompt_syntax": self.prompt_syntax,
            "lora": self.lora,
            "sampler": self.sampler,
            "priority": self.priority,
            "progress": bool(self.stream),
            "preview_every": self._preview_every(steps),
        }

    def usage(self, info: ServerInfo, images: int) -> dict[str, Any]:
        """Estimates: words and marks of the texts, cells of the pictures' grid."""
        text = len(WORD.findall(f"{self.prompt} {self.negative_prompt or ''}"))
        width, height = self._size(info)
        image = images * width * height // info.sizes["multiple_of"] ** 2
        return {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": image,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": image},
            "total_tokens": text + image,
        }

    def _size(self, info: ServerInfo) -> tuple[int, int]:
        found = SIZE.fullmatch(self.size or "auto")
        if found is None:
            return info.defaults["width"], info.defaults["height"]
        sides = int(found[1]), int(found[2])
        grid, largest = info.sizes["multiple_of"], info.sizes["largest"]
        if any(side % grid or side > largest for side in sides):
            allowed = f"both sides must be multiples of {grid}, up to {largest}, or auto"
            raise invalid("size", self.size, allowed)
        return sides

    def _preview_every(self, steps: int) -> int:
        """So that `partial_images` previews come before the last step, evenly."""
        return max(1, steps // (self.partial_images + 1)) if self.partial_images else 0


def check_not_served(body: dict[str, Any]) -> None:
    """Fields and values of OpenAI's that ask for what no checkpoint does.

    Raises:
        ApiError: the first of them.
    """
    for name in NOT_SERVED:
        if body.get(name) is not None:
            raise _unsupported(name, f"{name} is not served: pictures are png, jpeg or webp.")
    if body.get("output_format") in ("gif", "svg"):
        name = body["output_format"]
        raise _unsupported("output_format", f"output_format={name!r} is not served: use png, "
                           "jpeg or webp.")  # fmt: skip
    if body.get("background") == "transparent":
        raise _unsupported("background", "background='transparent' is not served: use opaque.")


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_value")
