"""`GenerationRequest`: the table of request fields, each validated once and frozen.

Every rule about what a client may send stands here, and is checked before any compute. A new
field is a row here and its use; `python -m twinbrush.engine.field_tables` then writes the copies
that the front doors, the client and the README keep.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import twinbrush
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.fields import (
    REQUIRED,
    Choice,
    Field,
    Flag,
    FromConfig,
    Integer,
    InvalidArgument,
    Number,
    Pair,
    Rule,
    Side,
    Text,
    row,
    single,
    table,
)
from twinbrush.engine.images import IMAGE_FORMATS
from twinbrush.engine.loras import LoraChoice
from twinbrush.engine.prompt_syntax import PLAIN, SYNTAXES, parse
from twinbrush.engine.samplers import MAX_STEPS, SAMPLERS, SIGMA_SCHEDULES, trajectory

MAX_PROMPT_CHARACTERS = 2000
MAX_ID_CHARACTERS = 256
MAX_CLIENT_CHARACTERS = 64
MAX_GUIDANCE_SCALE = 50.0
MAX_IMAGES = 16
MAX_SEED = 2**63 - 1
MAX_PIXELS_A_SIDE = 2**20  # of sizes that SDXL is conditioned on
MAX_DEADLINE_MS = 24 * 3600 * 1000
PRIORITIES = ("low", "normal", "high")
SHORT_HASH = 10  # digits of a checkpoint's hash in image files, as A1111 writes them
CHECKPOINTS_OWN = "default"  # sigma schedule
INPUT_FILE_HINT = (
    "The request sets every input, as perf_analyzer does with random data: run it with "
    "--input-data benchmarks/inputs/mixed.json."
)
# What says how a picture is delivered, not how it looks.
NOT_IN_METADATA = frozenset({
    "num_images", "image_format", "image_quality", "metadata", "priority", "deadline_ms", "client",
    "progress", "preview_every",
})  # fmt: skip

_NATIVE_WIDTH = FromConfig("checkpoint's", lambda config: config.native_width)
_NATIVE_HEIGHT = FromConfig("checkpoint's", lambda config: config.native_height)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request as the engine takes it; image `k` is drawn from `seed + k`."""

    prompt: str = row(
        "STRING", REQUIRED, Text(MAX_PROMPT_CHARACTERS, blank=False),
        "What to paint. A prompt longer than an encoder's limit is truncated; the response's "
        "`warning` says so.",
    )  # fmt: skip
    negative_prompt: str = row(
        "STRING", "", Text(MAX_PROMPT_CHARACTERS), "What guidance leads away from."
    )
    prompt_syntax: str | None = row(
        "STRING", FromConfig(f"`{PLAIN}`", lambda config: None), Choice(SYNTAXES),
        "How both prompts are read: `a1111` takes weights as `(word:1.2)` and `[word]`, `BREAK`, "
        "and prompts of several chunks of tokens.",
    )  # fmt: skip
    lora: str | None = row(
        "STRING", FromConfig("none", lambda config: None), LoraChoice(),
        "LoRAs that the server's checkpoint was exported with, and their scales: `ink:0.8,film`. "
        "`info` lists them.",
    )  # fmt: skip
    seed: int = row(
        "INT64", FromConfig("random", lambda config: secrets.randbelow(2**32)),
        Integer(0, MAX_SEED), "Image `k` is drawn from `seed + k`. Always returned.",
    )  # fmt: skip
    steps: int = row(
        "INT32", FromConfig("checkpoint's", lambda config: config.defaults.steps),
        Integer(1, MAX_STEPS), "Denoising steps.",
    )  # fmt: skip
    guidance_scale: float = row(
        "FP32", FromConfig("checkpoint's", lambda config: config.defaults.guidance_scale),
        Number(0, MAX_GUIDANCE_SCALE), "How closely to follow the prompt; 1 is no guidance.",
    )  # fmt: skip
    width: int = row("INT32", _NATIVE_WIDTH, Side(), "Width in pixels.")
    height: int = row("INT32", _NATIVE_HEIGHT, Side(), "Height in pixels.")
    sampler: str = row(
        "STRING", FromConfig("checkpoint's", lambda config: config.defaults.sampler),
        Choice(tuple(SAMPLERS)), "How latents go from one step to the next.",
    )  # fmt: skip
    sigma_schedule: str = row(
        "STRING", "default", Choice((CHECKPOINTS_OWN, *SIGMA_SCHEDULES)),
        "How the noise levels of the steps are spaced; the default is the checkpoint's own.",
    )  # fmt: skip
    eta: float | None = row(
        "FP32", FromConfig("0", lambda config: None), Number(0, 1),
        "Share of fresh noise in each step, of `ddim` and `tcd` alone.",
    )  # fmt: skip
    guidance_rescale: float = row(
        "FP32", 0.0, Number(0, 1),
        "How far guided predictions are brought back to the contrast of unguided ones.",
    )  # fmt: skip
    guidance_start: float = row(
        "FP32", 0.0, Number(0, 1), "Share of the steps after which guidance begins."
    )
    guidance_end: float = row(
        "FP32", 1.0, Number(0, 1), "Share of the steps after which guidance ends."
    )
    original_size: tuple[int, int] | None = row(
        "INT32", FromConfig("height, width", lambda config: None), Pair(1, MAX_PIXELS_A_SIDE),
        "Height and width before training's resizing that the picture looks as if it had.",
    )  # fmt: skip
    crop_top_left: tuple[int, int] | None = row(
        "INT32", FromConfig("0, 0", lambda config: None), Pair(0, MAX_PIXELS_A_SIDE),
        "Top and left of the crop that the picture looks as if it were.",
    )  # fmt: skip
    target_size: tuple[int, int] | None = row(
        "INT32", FromConfig("height, width", lambda config: None), Pair(1, MAX_PIXELS_A_SIDE),
        "Height and width that the picture looks as if it were trained at.",
    )  # fmt: skip
    num_images: int = row("INT32", 1, Integer(1, MAX_IMAGES), "Number of images.")
    image_format: str = row(
        "STRING", "png_base64", Choice(IMAGE_FORMATS),
        "File format. The default is valid in JSON; over gRPC, formats without `_base64` save a "
        "quarter of the bytes, and the Python client sends `png`. `raw` is RGB rows from the top.",
    )  # fmt: skip
    image_quality: int | None = row(
        "INT32", FromConfig("format's", lambda config: None), Integer(1, 100),
        "Quality of jpeg, webp and avif files; other formats lose nothing.",
    )  # fmt: skip
    deterministic: bool = row(
        "BOOL", False, Flag(),
        "Same bytes however busy the server is; the request's UNet calls are not shared.",
    )  # fmt: skip
    metadata: bool = row(
        "BOOL", True, Flag(), "Write prompt, seed and settings into the image file."
    )
    priority: str = row(
        "STRING", "normal", Choice(PRIORITIES),
        "Weight among the live requests; no priority starves another.",
    )  # fmt: skip
    deadline_ms: int = row(
        "INT32", 0, Integer(0, MAX_DEADLINE_MS),
        "Milliseconds after which the request is ended with `DEADLINE_EXCEEDED`; 0 sets none.",
    )  # fmt: skip
    client: str = row(
        "STRING", "", Text(MAX_CLIENT_CHARACTERS),
        "Who asks. The live requests of one client have at most a share of the queue; those "
        "without a name are not counted together.",
    )  # fmt: skip
    progress: bool = row(
        "BOOL", True, Flag(), "Send a `progress` event for every step.", stream_only=True
    )
    preview_every: int = row(
        "INT32", 0, Integer(0, MAX_STEPS),
        "Send a `preview`, one pixel a latent cell, every so many steps; 0 sends none.",
        stream_only=True,
    )  # fmt: skip

    @classmethod
    def parse(
        cls, tensors: Mapping[str, np.ndarray | None], config: PipelineConfig
    ) -> GenerationRequest:
        """A request from its tensors, one element each; absent fields are None or missing.

        Raises:
            InvalidArgument: a field is unknown, or its value is not allowed.
        """
        with explaining_generated_inputs(tensors):
            return cls._parse(tensors, config)

    @classmethod
    def _parse(
        cls, tensors: Mapping[str, np.ndarray | None], config: PipelineConfig
    ) -> GenerationRequest:
        _check_sizes(tensors)
        values = {name: field.parse(tensors.get(name), config) for name, field in FIELDS.items()}
        last_seed = MAX_SEED - values["num_images"] + 1  # seed + k must be a seed too
        if values["seed"] > last_seed:
            allowed = f"must be between 0 and {last_seed} with {values['num_images']} images"
            raise InvalidArgument("seed", values["seed"], allowed)
        if values["prompt_syntax"] not in (None, PLAIN):
            _check_syntax(values)
        pixels = values["width"] * values["height"]
        if config.max_pixels is not None and pixels > config.max_pixels:
            allowed = f"must make at most {config.max_pixels} pixels; with height="
            allowed += f"{values['height']} it makes {pixels}"
            raise InvalidArgument("width", values["width"], allowed)
        start, end = values["guidance_start"], values["guidance_end"]
        if start > end:
            allowed = f"must be at most guidance_end, which is {end:g}"
            raise InvalidArgument("guidance_start", start, allowed)
        request = cls(**values)
        try:
            trajectory(
                request.sampler, config.schedule, request.steps,
                request.chosen_sigma_schedule, request.chosen_eta,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument.worded(str(error)) from error
        return request

    @property
    def syntax(self) -> str:
        """That the prompts are read in."""
        return self.prompt_syntax or PLAIN

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's sizes: original height and width, top and left of the crop, target height, width.

        The negative prompt's are the same, as diffusers defaults to.
        """
        size = self.height, self.width
        crop = self.crop_top_left or (0, 0)
        return (*(self.original_size or size), *crop, *(self.target_size or size))

    @property
    def chosen_sigma_schedule(self) -> str | None:
        """None where it is the checkpoint's own."""
        return None if self.sigma_schedule == CHECKPOINTS_OWN else self.sigma_schedule

    @property
    def chosen_eta(self) -> float | None:
        """None is the sampler's own. By default tcd's is 0, as diffusers' pipelines say."""
        return 0.0 if self.eta is None and self.sampler == "tcd" else self.eta

    def metadata_of(self, index: int, config: PipelineConfig) -> dict:
        """What the file of image `index` carries: enough to ask for it again. Empty if not wanted.

        Args:
            index: of the image within the request.
            config: the checkpoint.
        """
        if not self.metadata:
            return {}
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in NOT_IN_METADATA and value is not None
        }
        values |= {"seed": self.seed + index, "checkpoint": config.checkpoint}
        if config.checkpoint_hash:
            values["checkpoint_hash"] = config.checkpoint_hash[:SHORT_HASH]
        return values | {"version": f"Twinbrush {twinbrush.__version__}"}


def _check_syntax(values: Mapping[str, Any]) -> None:
    for name in ("prompt", "negative_prompt"):
        try:
            parse(values[name])
        except ValueError as error:
            raise InvalidArgument(name, values[name], str(error)) from None


FIELDS: Mapping[str, Field] = table(GenerationRequest)

# What the streaming front door does besides painting; each is the only input of its request.
COMMANDS: Mapping[str, Field] = {
    field.name: field
    for field in (
        Field("cancel", "STRING", None, Text(MAX_ID_CHARACTERS, blank=False),
              "Alone in its request: cancels the live requests with this request id (over HTTP, "
              "the `id` in the body).", stream_only=True),
        Field("info", "BOOL", None, Flag(),
              "Alone in its request: send an `info` event, whose `info` is JSON: the checkpoint, "
              "sizes, defaults and fields of this server.", stream_only=True),
    )
}  # fmt: skip


def check_sizes(tensors: Mapping[str, np.ndarray | None]) -> None:
    """Refuses inputs that are unknown or too large, without reading, copying or decoding them.

    Raises:
        InvalidArgument: an input is unknown, is not one element, or has too many bytes.
    """
    with explaining_generated_inputs(tensors):
        _check_sizes(tensors)


def _check_sizes(tensors: Mapping[str, np.ndarray | None]) -> None:
    for name, tensor in tensors.items():
        field = FIELDS.get(name) or COMMANDS.get(name)
        if field is None:
            raise unknown_input(name, None if tensor is None else single(name, tensor), FIELDS)
        if tensor is not None:
            field.measure(tensor)


@contextmanager
def explaining_generated_inputs(names: Container[str]) -> Iterator[None]:
    """Names the input file for load generators in the refusal of a request with every input.

    Clients leave out what they do not need, and no checkpoint takes all inputs; `perf_analyzer`
    without `--input-data` fills in all of them with random values.
    """
    try:
        yield
    except InvalidArgument as error:
        if not all(name in names for name, field in FIELDS.items() if not field.stream_only):
            raise
        raise InvalidArgument.worded(f"{error} {INPUT_FILE_HINT}") from error


def unknown_input(name: str, value: object, names: Iterable[str]) -> InvalidArgument:
    return InvalidArgument(name, value, f"is no input; the inputs are {', '.join(names)}")


def describe_server(config: PipelineConfig) -> dict[str, Any]:
    """What clients may want to know of a server: checkpoint, sizes, samplers, defaults, fields."""
    defaults = {
        name: field.parse(None, config)
        for name, field in FIELDS.items()
        if not field.required and name != "seed"
    }
    return {
        "version": twinbrush.__version__,
        "checkpoint": config.checkpoint,
        "checkpoint_hash": config.checkpoint_hash,
        "samplers": list(SAMPLERS),
        "loras": list(config.loras),
        "image_formats": list(IMAGE_FORMATS),
        "defaults": defaults,
        "sizes": {
            "native": config.native_side,
            "multiple_of": config.side_multiple,
            "largest": config.max_side,
            "max_pixels": config.max_pixels,
        },
        "fields": [
            {
                "name": name,
                "type": field.data_type,
                "required": field.required,
                "allowed": field.rule.allowed(),
                "help": field.help,
                "stream_only": field.stream_only,
                **_limits(field.rule),
            }
            for name, field in FIELDS.items()
        ],
    }


def _limits(rule: Rule) -> dict[str, Any]:
    """What a form needs to offer a field's values."""
    match rule:
        case Integer(low, high) | Number(low, high):
            return {"minimum": low, "maximum": high}
        case Choice(names):
            return {"choices": list(names)}
        case _:
            return {}
