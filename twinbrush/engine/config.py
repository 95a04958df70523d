"""The engine's settings: `pipeline.json` of the checkpoint, and parameters of `config.pbtxt`.

`export/` writes `pipeline.json` beside the tokenizers. This module only reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinbrush.engine.memory import NetworkMemory
from twinbrush.engine.samplers import NoiseSchedule

TOKENS = "encoder_hidden_states"  # UNet input: text tokens, a tower's length or a few times that
LORA_SCALE = "lora_scale"  # input of the UNet and of text encoders: a scale for each LoRA
TIME_IDS = "time_ids"  # UNet input: original size, top and left of the crop, target size
ENGINE = Path("text_to_image_stream/1")  # of a repository: where pipeline.json and tokenizers are
MAX_SIDE_FACTOR = 4  # a side may be this many times the side that the model was trained on
LONGEST_SHOWN = 60  # characters of a parameter in a message
MAX_SIDE = 2048  # pixels; past 2,896 a decoder of 256 channels has tensors that cuDNN does not take


@dataclass(frozen=True)
class Defaults:
    """Values of request fields that a request leaves out."""

    steps: int
    guidance_scale: float
    sampler: str


@dataclass(frozen=True)
class EncoderConfig:
    """One text encoder.

    Attributes:
        model: its served model, whose outputs are known by their own names.
        tokenizer: file of its tokenizer, beside `pipeline.json`.
        length: tokens that texts are padded or truncated to, L.
        pad: id of the padding token.
        mask: whether the model takes `attention_mask`.
        takes_loras: whether the model takes `lora_scale`.
    """

    model: str
    tokenizer: str
    length: int
    pad: int
    mask: bool = False
    takes_loras: bool = False

    @property
    def is_tower(self) -> bool:
        """Whether it is one of CLIP's, whose tokens are the UNet's; only these take no mask."""
        return not self.mask


@dataclass(frozen=True)
class PipelineConfig:
    """The checkpoint as the engine sees it.

    Attributes:
        checkpoint: its name, for messages.
        schedule: the noise schedule of the UNet.
        defaults: steps, guidance scale and sampler of a request that names none.
        native_width, native_height: of the pictures that the UNet was trained on, in pixels.
        side_multiple: width and height must be multiples of this, in pixels.
        scale_factor: pixels a latent cell, each way.
        latent_channels: C.
        encoders: the text encoders; they run side by side.
        fusion_inputs: the encoders' tensors that the fusion head takes; its outputs condition the
            UNet, and so does every encoder output that `unet_inputs` names.
        unet_inputs: inputs of the UNet besides `sample` and `timestep`.
        timestep_cond: width E of the guidance embedding, or None where guidance takes two rows.
        latent_to_rgb: the linear map of previews, see `images.preview`.
        zeros_for_empty_negative: whether an empty negative prompt is conditioned on zeros.
        max_chunks: how many times a tower's length the UNet's token axis may be.
        memory: what calls take, or None where no export has measured it.
        side_limit: pixels of a side that the operator allows, or None for the checkpoint's own.
        max_pixels: width × height that the operator allows, or None for any.
        loras: names of the LoRAs that requests can switch on, in the order of their scales.
        checkpoint_hash: SHA-256 of its weights in hexadecimal; empty where an export of an earlier
            version did not write it.
    """

    checkpoint: str
    schedule: NoiseSchedule
    defaults: Defaults
    native_width: int
    native_height: int
    side_multiple: int
    scale_factor: int
    latent_channels: int
    encoders: tuple[EncoderConfig, ...]
    fusion_inputs: tuple[str, ...]
    unet_inputs: tuple[str, ...]
    timestep_cond: int | None
    latent_to_rgb: tuple[tuple[float, float, float], ...]
    zeros_for_empty_negative: bool = False
    max_chunks: int = 1
    memory: NetworkMemory | None = None
    side_limit: int | None = None
    max_pixels: int | None = None
    loras: tuple[str, ...] = ()
    checkpoint_hash: str = ""

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk of text, with its start and end tokens."""
        return self.encoders[0].length

    @property
    def takes_sizes(self) -> bool:
        """Whether the UNet is conditioned on the sizes of pictures, as SDXL's is."""
        return TIME_IDS in self.unet_inputs

    @property
    def native_side(self) -> int:
        """The longer native side, in pixels."""
        return max(self.native_width, self.native_height)

    @property
    def max_side(self) -> int:
        """The longest side that a request may have, in pixels."""
        own = max(self.native_side, min(MAX_SIDE_FACTOR * self.native_side, MAX_SIDE))
        return own if self.side_limit is None else min(own, self.side_limit)

    def cells(self, width: int, height: int) -> int:
        """Latent cells of a picture of so many pixels."""
        return (width // self.scale_factor) * (height // self.scale_factor)

    @classmethod
    def load(cls, path: Path) -> PipelineConfig:
        """Reads `pipeline.json`.

        Raises:
            ValueError: the file is not there or not of this form; the message names it.
        """
        try:
            fields = json.loads(path.read_text())
            schedule = fields.pop("schedule")
            schedule["alphas_cumprod"] = tuple(schedule["alphas_cumprod"])
            fields["latent_to_rgb"] = tuple(tuple(row) for row in fields["latent_to_rgb"])
            fields["encoders"] = tuple(EncoderConfig(**entry) for entry in fields["encoders"])
            for name in ("fusion_inputs", "unet_inputs"):
                fields[name] = tuple(fields[name])
            if fields.get("memory") is not None:
                fields["memory"] = NetworkMemory.of_json(fields["memory"])
            fields["loras"] = tuple(fields.get("loras", ()))
            return cls(
                schedule=NoiseSchedule(**schedule),
                defaults=Defaults(**fields.pop("defaults")),
                **fields,
            )
        except FileNotFoundError:
            raise ValueError(f"{path} is not there: run `python -m export CHECKPOINT`") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a pipeline.json of this version: {error}") from error


COMMENT = re.compile(r"""("[^"\n]*"|'[^'\n]*')|#.*""")  # and strings, in which # is a character
WHOLE = re.compile(r"[0-9]{1,9}")
PARAMETER = re.compile(
    r"""key\s*:\s*["']([^"']+)["'][\s,;]*value\s*:?\s*\{\s*string_value\s*:\s*["']([^"']*)["']"""
)


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a `config.pbtxt` in Triton's JSON form; needs no protobuf.

    Raises:
        OSError: the file cannot be read.
    """
    text = COMMENT.sub(lambda match: match[1] or "", path.read_text())
    return {
        "parameters": {name: {"string_value": value} for name, value in PARAMETER.findall(text)}
    }


def optional_number(config: Mapping[str, Any], name: str) -> int | None:
    """A whole number of a parameter that may be empty or missing.

    Raises:
        ValueError: it is something else.
    """
    if not config.get("parameters", {}).get(name, {}).get("string_value", "").strip():
        return None
    return whole_numbers(config, name, 1)[0]


def whole_numbers(config: Mapping[str, Any], name: str, count: int | None = None) -> list[int]:
    """The whole numbers, `count` of them where it is given, of a parameter of `config.pbtxt`.

    Raises:
        ValueError: it is not there, or is not that.
    """
    entry = config.get("parameters", {}).get(name)
    text = None if entry is None else entry.get("string_value", "")
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    whole = text is not None and all(WHOLE.fullmatch(word) and int(word) for word in words)
    if not whole or count not in (None, len(words)):
        allowed = "whole numbers over 0, with commas" if count is None else "a whole number over 0"
        found = "not there" if text is None else f"{text[:LONGEST_SHOWN]!r}, which is not allowed"
        text = f"parameter {name} of config.pbtxt is {found}: {allowed}"
        raise ValueError(f"{text}, of at most 9 digits")
    return [int(word) for word in words]


def check_names(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses a parameter that would change nothing. Triton's own are in capitals.

    Raises:
        ValueError: a parameter of `config.pbtxt` is none of `known`.
    """
    known = sorted(known)
    for name in config.get("parameters", {}):
        if name not in known and not name.isupper():
            text = f"parameter {name[:LONGEST_SHOWN]} of config.pbtxt is unknown"
            raise ValueError(f"{text}: must be one of {', '.join(known)}")
