"""The wire: request fields become Triton inputs, responses become events."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from twinbrush_client.fields import DATA_TYPES

NUMPY_TYPES = {"BYTES": object, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32,
               "BOOL": np.bool_}  # fmt: skip


class TwinbrushError(Exception):
    """The server refused or ended a request.

    `code` is gRPC's status name (`INVALID_ARGUMENT`, `UNAVAILABLE`, `CANCELLED`,
    `DEADLINE_EXCEEDED`, `INTERNAL`), or an empty text where a stream does not tell it.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: InferenceServerException) -> TwinbrushError:
        code = str(error.status() or "").removeprefix("StatusCode.")
        return cls(code, str(error.message()))


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
    """Image `index`, finished; the same `seed` gives it again."""

    index: int
    seed: int
    image: Image.Image
    warning: str


def inputs(fields: Mapping[str, Any]) -> list[grpc.InferInput]:
    """Triton inputs of the fields that are given.

    Raises:
        TwinbrushError: there is no such field, or a value does not fit its type.
    """
    tensors = []
    for name, value in fields.items():
        if value is None:
            continue
        if name not in DATA_TYPES:
            text = f"{name} is no field: {', '.join(DATA_TYPES)} are"
            raise TwinbrushError("INVALID_ARGUMENT", text)
        data_type = DATA_TYPES[name]
        try:
            raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            array = np.array([raw], NUMPY_TYPES[data_type])
        except (OverflowError, TypeError, ValueError) as error:
            text = f"{name}={value!r} is not allowed: it must fit {data_type} ({error})"
            raise TwinbrushError("INVALID_ARGUMENT", text) from None
        tensor = grpc.InferInput(name, [1], data_type)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def picture(data: bytes, index: int, seed: int, warning: bytes) -> Picture:
    image = opened(data)
    image.info["seed"] = seed
    return Picture(index, seed, image, warning.decode())


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def event(result: grpc.InferResult) -> Progress | Picture:
    """The event that a response of the stream carries."""

    def value(name: str) -> Any:
        tensor = result.as_numpy(name)
        return None if tensor is None else tensor[0]

    if value("event") == b"image":
        return picture(value("image"), int(value("index")), int(value("seed")), value("warning"))
    step = (int(value("index")), int(value("step")), int(value("total_steps")))
    if value("event") == b"preview":
        return Preview(*step, opened(value("image")))
    return Progress(*step)
