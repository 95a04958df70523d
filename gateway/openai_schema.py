"""What OpenAI's doors answer, for the OpenAPI page; extensions are Twinbrush's own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What is wrong, the kind of error, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorBody


class TextAndImages(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Estimates: words and marks of the texts, cells of the pictures' grid."""

    input_tokens: int
    input_tokens_details: TextAndImages
    output_tokens: int
    output_tokens_details: TextAndImages
    total_tokens: int


class ImageData(BaseModel):
    """One image; `seed` paints it again, `warning` says what the server changed."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    warning: str | None = None


class ImagesAnswer(BaseModel):
    """The images of a request."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    size: str
    usage: Usage
    safety_identifier: str | None = None


class Model(BaseModel):
    """A checkpoint; `created` is when the gateway first saw it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """The checkpoints that are served."""

    object: Literal["list"]
    data: list[Model]
