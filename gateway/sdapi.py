"""A1111's doors: `/sdapi/v1/txt2img` and what tools ask beside it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from gateway import sampler_names
from gateway.errors import STATUSES, ApiError
from gateway.painting import Studio, base64_of
from gateway.png_info import png_info
from gateway.sdapi_fields import (
    CHECKPOINT,
    FORMAT,
    NAMES,
    TextToImage,
    check_settings,
    image_format,
    named_checkpoint,
)
from gateway.sdapi_jobs import Jobs, SdJob
from twinbrush_client import Cancelled

# What the gateway has none of; tools ask for them at their start.
EMPTY: dict[str, Any] = {
    "latent-upscale-modes": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [],
    "prompt-styles": [], "sd-vae": [], "script-info": [], "extensions": [], "artists": [],
    "artist-categories": [], "sd-modules": [],
    "scripts": {"txt2img": [], "img2img": []}, "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {"api": True},
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None,
                   "scale": 1}],
}  # fmt: skip
UNKNOWN_MEMORY = {"error": "the gateway does not know the servers' memory"}
# Options that tools read and that always have these values; see `sdapi_fields.SETTINGS`.
CONSTANT_OPTIONS = {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"}


class Refusal(BaseModel):
    """An error in A1111's form; `detail` and `errors` say the same."""

    error: str
    detail: str
    body: str
    errors: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": description}
    for status, description in STATUSES.items()
}


class Picture(BaseModel):
    """What `png-info` takes."""

    image: str = Field(description="A picture's file in base64, or as a data URL.")


class Options(BaseModel):
    """The options that have an effect: each caller has its own."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str | None = None
    samples_format: str | None = None


def router(studio: Studio) -> APIRouter:
    """The routes under `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", responses=ERRORS, tags=["A1111"])
    options = CallersOptions()
    _add_painting(routes, studio, options)
    _add_options(routes, studio, options)
    _add_lists(routes, studio)
    for name, value in EMPTY.items():
        _add_constant(routes, name, value)
    return routes


class CallersOptions:
    """The options that each caller has set."""

    def __init__(self) -> None:
        self._set: dict[str, dict[str, str]] = {}

    def of(self, request: Request) -> dict[str, str]:
        return self._set.setdefault(request.state.key.name, {})


def _add_painting(routes: APIRouter, studio: Studio, options: CallersOptions) -> None:
    jobs = Jobs()

    @routes.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> Response:
        """Paints images of a prompt."""
        body.check()
        settings = {CHECKPOINT: None, FORMAT: "png"} | options.of(request) | body.overrides
        model = named_checkpoint(settings[CHECKPOINT], studio.pool.hashes())
        job = SdJob(body, model, image_format(settings[FORMAT]))
        return JSONResponse(await _paint(studio, jobs, job, request))

    @routes.post("/interrogate")
    @routes.post("/extra-batch-images")
    @routes.post("/extra-single-image")
    @routes.post("/img2img")
    async def refuse(request: Request) -> Response:
        """Refuses: nothing that takes images is served."""
        text = f"{request.url.path} is not served: it needs image inputs; use /sdapi/v1/txt2img."
        raise ApiError(400, text, code="unsupported_endpoint")

    @routes.post("/png-info")
    async def read_png_info(body: Picture) -> Response:
        """How a picture was made, from its file."""
        return JSONResponse(await asyncio.to_thread(png_info, body.image))

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> Response:
        """How far the caller's oldest request is, with a look at its image."""
        return JSONResponse(await jobs.progress(request.state.key.name, not skip_current_image))

    @routes.post("/skip")
    @routes.post("/interrupt")
    async def interrupt(request: Request) -> Response:
        """Ends the caller's requests; they answer with what they have.

        A1111's skip ends the image that is being painted; here all of a request's are.
        """
        jobs.interrupt(request.state.key.name)
        return JSONResponse(None)


def _add_options(routes: APIRouter, studio: Studio, options: CallersOptions) -> None:
    @routes.get("/options")
    async def read_options(request: Request) -> Response:
        """The caller's options."""
        defaults = {CHECKPOINT: (await studio.info()).checkpoint, FORMAT: "png"}
        return JSONResponse(CONSTANT_OPTIONS | defaults | options.of(request))

    @routes.post("/options")
    async def set_options(body: Options, request: Request) -> Response:
        """Sets options for the caller's later requests; those that change no picture are taken."""
        check_settings(body.model_extra or {})
        given = body.model_dump(exclude_none=True, include={CHECKPOINT, FORMAT})
        if given.get(CHECKPOINT) == "":  # as some tools say that they want none in particular
            del given[CHECKPOINT]
        if CHECKPOINT in given:
            given[CHECKPOINT] = named_checkpoint(given[CHECKPOINT], studio.pool.hashes())
            await studio.info(given[CHECKPOINT])
        if FORMAT in given:
            image_format(given[FORMAT])
        options.of(request).update(given)
        return JSONResponse(None)


def _add_lists(routes: APIRouter, studio: Studio) -> None:
    @routes.get("/samplers")
    async def samplers() -> Response:
        """Samplers of the first checkpoint's server."""
        return JSONResponse(sampler_names.samplers((await studio.info()).samplers))

    @routes.get("/schedulers")
    async def schedulers() -> Response:
        """Spacings of the noise levels."""
        return JSONResponse(sampler_names.schedulers())

    @routes.get("/sd-models")
    async def models() -> Response:
        """The checkpoints that are served."""
        return JSONResponse([
            {"title": name, "model_name": name, "hash": sha256[:10] or None,
             "sha256": sha256 or None, "filename": name, "config": None}
            for name, sha256 in studio.pool.hashes().items()
        ])  # fmt: skip

    @routes.get("/loras")
    async def loras() -> Response:
        """LoRAs of the first checkpoint, for `<lora:NAME:SCALE>` in prompts."""
        return JSONResponse([
            {"name": name, "alias": name, "path": name, "metadata": {}}
            for name in (await studio.info()).loras
        ])  # fmt: skip

    @routes.post("/refresh-vae")
    @routes.post("/refresh-loras")
    @routes.post("/refresh-embeddings")
    @routes.post("/refresh-checkpoints")
    async def refresh() -> Response:
        """Asks the servers anew what they serve."""
        await studio.pool.probe()
        return JSONResponse(None)

    @routes.get("/memory")
    async def memory() -> Response:
        """Says that it is not known."""
        return JSONResponse({"ram": UNKNOWN_MEMORY, "cuda": UNKNOWN_MEMORY})


def _add_constant(routes: APIRouter, name: str, value: Any) -> None:
    @routes.get(f"/{name}", name=name)
    async def constant() -> Response:
        """What the gateway has of these."""
        return JSONResponse(value)


async def _paint(studio: Studio, jobs: Jobs, job: SdJob, request: Request) -> dict[str, Any]:
    info = await studio.info(job.model)
    job.fields = job.body.fields(info, job.image_format)
    prompt, key = job.body.painted_prompt, request.state.key.name
    async with studio.painting(request, prompt, job.model, job.fields, NAMES) as painted:
        with jobs.live(key, job, painted):
            try:
                async for event in painted:
                    job.take(event)
            except Cancelled:
                if not job.interrupted:
                    raise
    studio.metrics.pictures.inc(len(job.pictures))
    files = await job.files() if job.body.send_images is not False else []
    return {
        "images": [base64_of(file) for file in files],
        "parameters": job.body.model_dump(),
        "info": job.info(info),
    }
