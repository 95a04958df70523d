"""The wire: request fields become Triton's requests, its responses become events.

Checks types and names; which values are allowed is for the server to say. Knows no channels.
"""

from __future__ import annotations

import io
import json
import numbers
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.grpc import service_pb2

from twinbrush_client.errors import invalid
from twinbrush_client.fields import ALLOWED, COUNTS, DATA_TYPES, STREAM_ONLY

_REQUEST: Any = vars(service_pb2)["ModelInferRequest"]  # pyright knows none of its names
UNARY, STREAM = "text_to_image", "text_to_image_stream"
UNET = "unet"
IMAGE_FORMATS = ("png", "jpeg", "webp", "avif")  # that come as a picture; servers have others
ALIASES = {"num_inference_steps": "steps", "num_images_per_prompt": "num_images"}  # of diffusers
FORMATS = {"INT64": "<q", "INT32": "<i", "FP32": "<f", "BOOL": "<?"}
KINDS = {"INT64": "an integer", "INT32": "an integer", "FP32": "a number", "BOOL": "True or False"}
NUMPY_TYPES = {"BYTES": object, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32,
               "BOOL": np.bool_}  # fmt: skip
MAX_ID = 256  # characters of a request's id, as of the field `cancel`
MAX_TEXT = 8000  # bytes; the server's limit in characters is below


@dataclass(frozen=True)
class Progress:
    """Image `index` has had `step` of `total_steps`."""

    index: int
    step: int
    total_steps: int


@dataclass(frozen=True)
class Preview(Progress):
    """A progress with a rough look at the image: RGB, one pixel a latent cell."""

    image: Image.Image


@dataclass(frozen=True)
class Picture:
    """Image `index`, finished; the same `seed` gives it again. `data` is the file as it came."""

    index: int
    seed: int
    warning: str
    data: bytes = field(repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """The file, opened when this is first used; PIL decodes the pixels when they are."""
        image = Image.open(io.BytesIO(self.data))
        image.info["seed"] = self.seed
        return image


@dataclass(frozen=True)
class ServerInfo:
    """What a server serves.

    Attributes:
        version: of the server.
        checkpoint: its name.
        samplers, image_formats: names that a request may use.
        defaults: values of the fields that a request leaves out.
        sizes: `native`, `multiple_of` and `largest` side, in pixels.
        fields: name, type, allowed values and help of each request field; `minimum` and
            `maximum` of numbers, and `choices` of names.
        device: `CPU` or `GPU`: where Triton has placed the UNet; empty where that is not known.
        loras: names that a request's `lora` may use; empty from a server that has none.
        checkpoint_hash: SHA-256 of its weights in hexadecimal; empty where that is not known.
    """

    version: str
    checkpoint: str
    samplers: list[str]
    image_formats: list[str]
    defaults: dict[str, Any]
    sizes: dict[str, int]
    fields: list[dict[str, Any]]
    device: str = ""
    loras: list[str] = field(default_factory=list)
    checkpoint_hash: str = ""

    @classmethod
    def of(cls, text: bytes) -> ServerInfo:
        known = json.loads(text)  # a newer server may say more
        return cls(**{e.name: known[e.name] for e in fields(cls) if e.name in known})


Event = Progress | Picture


def requests(prompt: str | Sequence[str], given: Mapping[str, Any]) -> list[Any]:
    """A unary request for each prompt.

    With a seed, the images of all prompts count up from it.

    Raises:
        InvalidRequest: a field is unknown, or its value has the wrong type.
    """
    values = _checked_unary(given)
    prompts = [prompt] if isinstance(prompt, str) or not _is_list(prompt) else list(prompt)
    count = values.get("num_images", 1)
    made = []
    for index, text in enumerate(prompts):
        own = values | {"prompt": _typed("prompt", text)}
        if "seed" in values:
            seed = values["seed"] + index * count
            own["seed"] = seed if index == 0 else _typed("seed", seed)
        made.append(request(UNARY, own))
    return made


def unary_request(prompt: str, given: Mapping[str, Any], request_id: str | None = None) -> Any:
    """The request of one prompt whose pictures come at once; see `stream_request`."""
    values = _checked_unary(given)
    return request(UNARY, {"prompt": _typed("prompt", prompt)} | values, request_id)


def _checked_unary(given: Mapping[str, Any]) -> dict[str, Any]:
    values = checked(given)
    for name in STREAM_ONLY:
        if name in values:
            raise invalid(name, values[name], "is a field of stream() only")
    return values


def _is_list(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)


def stream_request(prompt: str, given: Mapping[str, Any], request_id: str | None = None) -> Any:
    """The request of a stream; without a `request_id`, it gets one of its own.

    Raises:
        InvalidRequest: a field is unknown, or its value has the wrong type.
    """
    return request(STREAM, {"prompt": _typed("prompt", prompt)} | checked(given), request_id)


def num_images(given: Mapping[str, Any]) -> int:
    """How many pictures a request that was checked brings."""
    return checked(given).get("num_images", 1)


def info_request() -> Any:
    made = _REQUEST(model_name=STREAM)
    made.inputs.add(name="info", datatype="BOOL", shape=[1])
    made.raw_input_contents.append(struct.pack("<?", True))
    return made


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None, by the server's names, with an image format that PIL reads.

    Raises:
        InvalidRequest: a field is unknown, or its value has the wrong type.
    """
    values: dict[str, Any] = {}
    for alias, value in given.items():
        if value is None:
            continue
        name = ALIASES.get(alias, alias)
        if name not in DATA_TYPES or name == "prompt":
            allowed = f"is no field; the fields are {', '.join(DATA_TYPES)}"
            raise invalid(alias, value, allowed)
        if name in values:
            other = next(a for a in ALIASES if a in given and ALIASES[a] == name)
            raise invalid(other, given[other], f"is another name of {name}, which is given too")
        values[name] = typed(name, value)
    wanted = values.setdefault("image_format", IMAGE_FORMATS[0])
    if wanted not in IMAGE_FORMATS:
        raise invalid("image_format", wanted, f"must be one of {', '.join(IMAGE_FORMATS)}")
    return values


def typed(name: str, value: Any) -> Any:
    """A field's value in plain Python types.

    Raises:
        InvalidRequest: it has another type.
    """
    return _typed_several(name, value) if name in COUNTS else _typed(name, value)


def _typed_several(name: str, value: Any) -> tuple[Any, ...]:
    """The values of a field that has several."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != COUNTS[name]:
        raise invalid(name, value, f"must be {COUNTS[name]} values")
    return tuple(_typed(name, element) for element in value)


def _typed(name: str, value: Any) -> Any:
    """The value as a plain Python one of the field's type, which is checked and not coerced."""
    data_type = DATA_TYPES[name]
    if data_type == "BYTES":
        if not isinstance(value, str):
            raise invalid(name, value, "must be text")
        if len(value) > MAX_TEXT:
            raise invalid(name, value, f"must have {ALLOWED[name]}; it has {len(value)}")
        if not is_text(value):
            raise invalid(name, value, "must be text that UTF-8 can hold")
        return value
    is_flag = isinstance(value, bool | np.bool_)
    if data_type == "BOOL" and is_flag:
        return bool(value)
    if data_type == "FP32" and isinstance(value, numbers.Real) and not is_flag:
        return _fitting(name, value)
    if data_type in ("INT32", "INT64") and isinstance(value, numbers.Integral) and not is_flag:
        return _fitting(name, value)
    raise invalid(name, value, f"must be {KINDS[data_type]}")


def _fitting(name: str, value: Any) -> float:
    data_type = DATA_TYPES[name]
    try:
        plain = float(value) if data_type == "FP32" else int(value)
        struct.pack(FORMATS[data_type], plain)
    except (struct.error, OverflowError):
        raise invalid(name, value, f"must be {ALLOWED[name]}") from None
    return plain


def request(model: str, values: Mapping[str, Any], request_id: str | None = None) -> Any:
    """Triton's request of fields that are checked.

    Raises:
        InvalidRequest: `request_id` is none that a `cancel` could name.
    """
    made = _REQUEST(model_name=model, id=_checked_id(request_id) or uuid.uuid4().hex)
    for name, value in values.items():
        data_type = DATA_TYPES[name]
        made.inputs.add(name=name, datatype=data_type, shape=[COUNTS.get(name, 1)])
        if data_type == "BYTES":
            data = value.encode()
            made.raw_input_contents.append(struct.pack("<I", len(data)) + data)
        else:
            elements = value if isinstance(value, tuple) else (value,)
            packed = [struct.pack(FORMATS[data_type], element) for element in elements]
            made.raw_input_contents.append(b"".join(packed))
    return made


def _checked_id(request_id: object) -> str | None:
    if request_id is None:
        return None
    if not isinstance(request_id, str) or len(request_id) > MAX_ID or not is_text(request_id):
        raise invalid("request_id", request_id, f"must be text of up to {MAX_ID} characters")
    return request_id


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: lone halves of surrogate pairs are no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def inputs(values: Mapping[str, Any]) -> list[triton.InferInput]:
    """The fields as inputs of `tritonclient`, unchecked, for who uses it in place of `Client`."""
    tensors = []
    for name, value in values.items():
        raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        elements = list(raw) if isinstance(raw, tuple) else [raw]
        tensor = triton.InferInput(name, [len(elements)], DATA_TYPES[name])
        tensor.set_data_from_numpy(np.array(elements, NUMPY_TYPES[DATA_TYPES[name]]))
        tensors.append(tensor)
    return tensors


def outputs(response: Any) -> dict[str, list[Any]]:
    """The outputs of a response, as lists of Python values."""
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {output.name: _values(output.datatype, raw) for output, raw in pairs}


def _values(data_type: str, raw: bytes) -> list[Any]:
    if data_type != "BYTES":
        return [value for (value,) in struct.iter_unpack(FORMATS[data_type], raw)]
    values, start = [], 0
    while start < len(raw):
        (size,) = struct.unpack_from("<I", raw, start)
        values.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return values


def pictures(response: Any) -> list[Picture]:
    """The pictures of a unary response."""
    values = outputs(response)
    warning = values["warning"][0]
    rows = enumerate(zip(values["image"], values["seed"], strict=True))
    return [Picture(index, seed, warning.decode(), data) for index, (data, seed) in rows]


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def server_info(response: Any) -> ServerInfo:
    """The answer of an `info_request`."""
    return ServerInfo.of(outputs(response.infer_response)["info"][0])


def placement_request() -> Any:
    """Asks for the configuration of the UNet as Triton has completed it."""
    return vars(service_pb2)["ModelConfigRequest"](name=UNET)


def device(answer: Any) -> str:
    """`GPU` or `CPU`, of the answer to a `placement_request`; empty where neither is said."""
    names = {group.Kind.Name(group.kind) for group in answer.config.instance_group}
    return "GPU" if "KIND_GPU" in names else "CPU" if "KIND_CPU" in names else ""


def event(response: Any) -> Event:
    """The event of a stream's response that is no error."""
    value = {name: values[0] for name, values in outputs(response.infer_response).items()}
    match value["event"]:
        case b"image":
            return Picture(value["index"], value["seed"], value["warning"].decode(), value["image"])
        case b"preview":
            step = (value["index"], value["step"], value["total_steps"])
            return Preview(*step, opened(value["image"]))
        case _:
            return Progress(value["index"], value["step"], value["total_steps"])
