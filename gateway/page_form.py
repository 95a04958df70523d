"""The page's form: what its controls offer, the request of their values, and the way back.

Which values are allowed is for the server to say; a form only offers what `ServerInfo` lists.
Knows no Gradio and no HTML.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from twinbrush_client import ServerInfo
from twinbrush_client.errors import invalid
from twinbrush_client.fields import ALLOWED
from twinbrush_client.wire import IMAGE_FORMATS

SEED_BITS = 32  # of a seed that the page draws: short enough to read aloud
SHAPES = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))
SCALES = (1.0, 1.5, 2.0)  # of the native area's side
SIZE = re.compile(r"\s*(\d{1,6})\s*[x×*]\s*(\d{1,6})\s*")
PREVIEWS = 10  # about so many of an image
# Fields that controls of the same name hold as they are.
PLAIN = (
    "negative_prompt", "steps", "guidance_scale", "sampler", "num_images", "priority", "lora",
    "image_format", "prompt_syntax", "sigma_schedule", "eta", "guidance_rescale", "guidance_start",
    "guidance_end", "deterministic",
)  # fmt: skip
CONTROLS = ("prompt", "size", "seed", *PLAIN)
PAGES_OWN = ("client", "progress", "preview_every")  # fields that the page sets, never a picture
SCENES = (
    "a large blue ring on a brown background",
    "a small green star left of a large red circle",
    "a yellow triangle above a purple square on white",
    "two orange crosses on a black background",
)
EXAMPLES = (
    "a lighthouse on a cliff at dusk, oil painting",
    "a bowl of lemons in the morning light, photograph",
    "a fox in a snowy forest, watercolour",
    "an old map of an island that does not exist",
)


def lora_help(info: ServerInfo) -> str:
    """Which LoRAs there are, and how to write them."""
    first = info.loras[0] if info.loras else "NAME"
    return f"{', '.join(info.loras)}; with a scale, {first}:0.8. Several stand with commas."


def examples(info: ServerInfo) -> tuple[str, ...]:
    """Prompts to try; the demo checkpoint knows the words of its toy world alone."""
    return SCENES if info.checkpoint.startswith("scenes-") else EXAMPLES


def size_text(width: object, height: object) -> str:
    return f"{width} × {height}"


def sizes(info: ServerInfo) -> list[str]:
    """Sizes to choose from: usual shapes at the native area and above, that the server allows."""
    native, step, largest = (info.sizes[name] for name in ("native", "multiple_of", "largest"))
    most = info.sizes.get("max_pixels") or largest**2
    found = {(info.defaults["width"], info.defaults["height"]): None}
    for scale in SCALES:
        for across, down in SHAPES:
            stretch = (across / down) ** 0.5
            width = round(native * scale * stretch / step) * step
            height = round(native * scale / stretch / step) * step
            fits = max(width, height) <= largest and width * height <= most
            if fits and min(width, height) >= step:
                found[width, height] = None
    return [size_text(width, height) for width, height in found]


def limits(info: ServerInfo, name: str) -> dict[str, Any]:
    """Minimum, maximum and choices of a field, as far as the server tells them."""
    entry = next((field for field in info.fields if field["name"] == name), {})
    return {key: entry[key] for key in ("minimum", "maximum", "choices") if key in entry}


def choices(info: ServerInfo, name: str) -> list[str]:
    """Names that a field may have."""
    if name == "sampler":
        return info.samplers
    if name == "image_format":
        return [each for each in IMAGE_FORMATS if each in info.image_formats]
    return limits(info, name).get("choices", [info.defaults.get(name)])  # older servers tell none


def defaults(info: ServerInfo) -> dict[str, Any]:
    """The value of each control but prompt and seed, of a request that names none."""
    values = {name: info.defaults.get(name) for name in PLAIN}
    values["prompt_syntax"] = choices(info, "prompt_syntax")[0]
    size = size_text(info.defaults["width"], info.defaults["height"])
    return values | {"size": size, "image_format": IMAGE_FORMATS[0]}


def new_seed() -> str:
    return str(secrets.randbits(SEED_BITS))


def request_fields(
    values: Mapping[str, Any], others: Mapping[str, Any], info: ServerInfo
) -> dict[str, Any]:
    """The fields of a request besides its prompt; those at their default are left out.

    Args:
        values: of the controls, by name.
        others: fields of a restored picture that have no control.
        info: of the server.

    Raises:
        InvalidRequest: the size or the seed cannot be read.
    """
    size = SIZE.fullmatch(str(values["size"] or ""))
    if not size:
        raise invalid("size", values["size"], "must be width × height in pixels, such as 64 × 64")
    fields = {name: values[name] for name in PLAIN if values[name] not in (None, "")}
    fields |= {"width": int(size[1]), "height": int(size[2])}
    known = info.defaults | defaults(info)
    fields = {k: v for k, v in fields.items() if v != known.get(k)} | dict(others)
    return fields | {"seed": _seed(values["seed"])}


def preview_every(steps: int) -> int:
    """Steps from one preview to the next."""
    return max(1, round(steps / PREVIEWS))


def control_values(fields: Mapping[str, Any], info: ServerInfo) -> dict[str, Any]:
    """The controls' values of a picture's request; what the picture leaves out is the default."""
    values = defaults(info) | {name: fields[name] for name in PLAIN if name in fields}
    width, height = (fields.get(name, info.defaults[name]) for name in ("width", "height"))
    values |= {"size": size_text(width, height), "prompt": fields["prompt"], "num_images": 1}
    return values | {"seed": str(fields.get("seed", ""))}


def without_control(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture's request had besides what controls hold."""
    known = {*CONTROLS, *PAGES_OWN, "width", "height"}
    return {name: value for name, value in fields.items() if name not in known}


def _seed(text: object) -> int:
    digits = str(text or "").strip()
    if not digits.isdecimal() or len(digits) > len(str(2**63)):
        raise invalid("seed", text, f"must be {ALLOWED['seed']}")
    return int(digits)
