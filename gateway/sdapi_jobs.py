"""Live requests of A1111's door: their progress, their previews, their interruption."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from gateway.painting import enlarged
from gateway.pool import Job
from gateway.sampler_names import TITLES
from gateway.sdapi_fields import TextToImage
from twinbrush_client import Picture, Preview, Progress, ServerInfo
from twinbrush_client.story import texts_of
from twinbrush_client.wire import Event

IDLE = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "",
        "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0,
        "sampling_steps": 0}  # fmt: skip


@dataclass(eq=False)
class SdJob:
    """One `txt2img`: what was asked, and what has come so far.

    Attributes:
        model: the checkpoint, or None for the first.
        fields: of the server's request.
        previews: the latest of each image that is not finished.
    """

    body: TextToImage
    model: str | None
    image_format: str
    fields: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    started: float = field(default_factory=time.time)
    pictures: dict[int, Picture] = field(default_factory=dict)
    previews: dict[int, Image.Image] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Notes an event of the server."""
        if isinstance(event, Picture):
            self.pictures[event.index] = event
            self.previews.pop(event.index, None)
            self.steps[event.index] = self.fields["steps"]
        elif isinstance(event, Progress):
            self.steps[event.index] = event.step
            if isinstance(event, Preview):
                self.previews[event.index] = event.image

    @property
    def share(self) -> float:
        """Of the work that is done."""
        return sum(self.steps.values()) / (self.body.images * self.fields["steps"])

    async def files(self) -> list[bytes]:
        """The pictures in order; of an interrupted request, also the unfinished as they look."""
        size = self.fields["width"], self.fields["height"]
        found = {index: picture.data for index, picture in self.pictures.items()}
        for index, preview in self.previews.items():
            found[index] = await enlarged(preview, size, self.image_format)
        return [found[index] for index in sorted(found)]

    def info(self, server: ServerInfo) -> str:
        """A1111's JSON about the images, which a server has painted."""
        body, fields = self.body, self.fields
        pictures = [self.pictures[index] for index in sorted(self.pictures)]
        seeds = [picture.seed for picture in pictures]
        negative = body.negative_prompt or ""
        chosen = server.defaults | {name: v for name, v in fields.items() if v is not None}
        sampler = chosen["sampler"]
        warnings = {picture.warning for picture in pictures} - {""} | set(body.warnings)
        return json.dumps({
            "prompt": body.prompt, "all_prompts": [body.prompt] * len(pictures),
            "negative_prompt": negative, "all_negative_prompts": [negative] * len(pictures),
            "seed": seeds[0] if seeds else -1, "all_seeds": seeds,
            "width": fields["width"], "height": fields["height"],
            "sampler_name": TITLES.get(sampler, sampler), "steps": fields["steps"],
            "cfg_scale": chosen["guidance_scale"],
            "batch_size": body.batch_size or 1, "sd_model_name": server.checkpoint,
            "sd_model_hash": server.checkpoint_hash[:10], "index_of_first_image": 0,
            "infotexts": [texts_of(picture.image)[1] for picture in pictures],
            "job_timestamp": _timestamp(self.started), "clip_skip": 1, "styles": [],
            "extra_generation_params": {}, "warnings": sorted(warnings),
        })  # fmt: skip


class Jobs:
    """The live jobs of each caller. For one event loop."""

    def __init__(self) -> None:
        self._live: dict[str, dict[SdJob, Job]] = {}

    @contextmanager
    def live(self, caller: str, job: SdJob, painted: Job) -> Iterator[None]:
        jobs = self._live.setdefault(caller, {})
        jobs[job] = painted
        try:
            yield
        finally:
            del jobs[job]

    def interrupt(self, caller: str) -> None:
        for job, painted in list(self._live.get(caller, {}).items()):
            job.interrupted = True
            painted.cancel()

    async def progress(self, caller: str, with_image: bool) -> dict[str, Any]:
        """Of the caller's oldest job."""
        job = next(iter(self._live.get(caller, {})), None)
        if job is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": IDLE, "current_image": None,
                    "textinfo": None}  # fmt: skip
        share, spent = job.share, time.time() - job.started
        batch = job.body.batch_size or 1
        current = min(job.body.images - 1, len(job.pictures))
        return {
            "progress": share,
            "eta_relative": spent / share - spent if share else 0.0,
            "state": IDLE | {
                "interrupted": job.interrupted, "job": f"Batch {current // batch + 1}",
                "job_count": job.body.n_iter or 1, "job_no": current // batch,
                "job_timestamp": _timestamp(job.started),
                "sampling_step": max(job.steps.values(), default=0) % job.fields["steps"],
                "sampling_steps": job.fields["steps"],
            },
            "current_image": await self._look(job) if with_image else None,
            "textinfo": None,
        }  # fmt: skip

    @staticmethod
    async def _look(job: SdJob) -> str | None:
        """A1111's live preview: all images that are being painted, side by side."""
        previews = [job.previews[index] for index in sorted(job.previews)]
        if not previews:
            return None
        size = job.fields["width"], job.fields["height"]
        return await asyncio.to_thread(_side_by_side, previews, size)


def _side_by_side(previews: list[Image.Image], size: tuple[int, int]) -> str:
    sheet = Image.new("RGB", (size[0] * len(previews), size[1]))
    for number, preview in enumerate(previews):
        sheet.paste(preview.resize(size, Image.Resampling.BICUBIC), (number * size[0], 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "png", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
