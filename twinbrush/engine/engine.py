"""The engine: tokenize, encode, denoise, decode, reply, for many requests at once.

Four threads, each with a queue of its own, so that encoding, decoding and answering run
beside the next UNet call. It sees networks through `Models` and clients through a `reply`
callback; it knows nothing of Triton.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twinbrush.engine import images
from twinbrush.engine.batcher import StepBatcher
from twinbrush.engine.capacity import Capacity, capacities, decoder_pictures
from twinbrush.engine.conditioning import Conditioner, Text
from twinbrush.engine.config import PipelineConfig, whole_numbers
from twinbrush.engine.denoise import ImageJob, Models, denoise_step
from twinbrush.engine.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.engine.guidance import guidance_embedding
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.request import GenerationRequest
from twinbrush.engine.samplers import trajectory

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job(ImageJob):
    generation: Generation
    index: int


class Engine:
    """Runs requests against `models`.

    Args:
        models: the served networks.
        config: the checkpoint.
        tokenizer: its tokenizers.
        max_rows: rows of a UNet call at the native size; fewer for larger pictures, see `capacity`.
        buckets: row counts that UNet calls are padded up to, at most those that are allowed, for
            runtimes that compile shapes.
        queue_size: requests that may live at once; one more is refused.
    """

    def __init__(
        self,
        models: Models,
        config: PipelineConfig,
        tokenizer: PromptTokenizer,
        max_rows: int = 32,
        buckets: Sequence[int] = (),
        queue_size: int = 128,
    ):
        self.config = config
        self._models, self._tokenizer = models, tokenizer
        self._capacities = capacities(config, max_rows)
        self._buckets, self._queue_size = buckets, queue_size
        self._latent_to_rgb = np.array(config.latent_to_rgb, np.float32)
        self._batcher: StepBatcher[_Job] = StepBatcher()
        self._work = threading.Condition()  # guards the batcher, _live and every `ended`
        self._live: set[Generation] = set()
        self._closing = False
        self._conditioner = Conditioner(models, tokenizer, max_rows)
        self._to_encode: queue.SimpleQueue = queue.SimpleQueue()
        self._to_decode: queue.SimpleQueue = queue.SimpleQueue()
        self._to_reply: queue.SimpleQueue = queue.SimpleQueue()
        loops = (self._encode_loop, self._denoise_loop, self._decode_loop, self._reply_loop)
        self._threads = [
            threading.Thread(target=loop, name=loop.__name__, daemon=True) for loop in loops
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def of_model(cls, folder: Path, config: Mapping[str, Any], models: Models) -> Engine:
        """The engine of a served model: its version folder, and its `config.pbtxt` as JSON.

        Raises:
            ValueError: a file of the folder, or a parameter, is not as it must be.
        """
        pipeline = PipelineConfig.load(folder / "pipeline.json")
        (max_rows,) = whole_numbers(config, "max_rows", 1)
        (queue_size,) = whole_numbers(config, "queue_size", 1)
        return cls(
            models,
            pipeline,
            PromptTokenizer(folder, pipeline),
            max_rows=max_rows,
            buckets=whole_numbers(config, "row_buckets"),
            queue_size=queue_size,
        )

    def submit(self, request: GenerationRequest, reply: Callable[[Event], None]) -> Generation:
        """Takes a request and returns at once.

        `reply` gets its events in order from one thread, `End` last and exactly once.

        Raises:
            EngineError: UNAVAILABLE, when the queue is full or the engine is closing.
        """
        warnings = tuple(self._warnings(request))
        generation = Generation(request, warnings, reply, self._end)
        with self._work:
            if self._closing:
                raise EngineError.of_shutdown()
            if len(self._live) >= self._queue_size:
                text = f"the queue is full ({self._queue_size} requests): try again later"
                raise EngineError("UNAVAILABLE", text)
            self._live.add(generation)
        self._to_encode.put(generation)
        return generation

    def close(self) -> None:
        """Ends every live request with UNAVAILABLE and stops the threads."""
        with self._work:
            self._closing = True
            live = list(self._live)
            self._work.notify_all()
        for generation in live:
            self._end(generation, EngineError.of_shutdown())
        for waiting in (self._to_encode, self._to_decode, self._to_reply):
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._conditioner.close()

    # Encode -----------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        for batch in _batches(self._to_encode):
            self._encode([generation for generation in batch if not generation.ended])

    def _encode(self, generations: Sequence[Generation]) -> None:
        try:
            hidden = self._conditioner([self._texts(g.request) for g in generations])
            jobs = [
                job for g, h in zip(generations, hidden, strict=True) for job in self._jobs(g, h)
            ]
        except Exception as error:
            if len(generations) > 1 and not isinstance(error, EngineError):
                log.warning("encoding %d prompts at once failed", len(generations), exc_info=True)
                for generation in generations:  # whose fault it is
                    if not generation.ended:
                        self._encode([generation])
            else:
                self._fail(generations, "encoding the prompt")
            return
        with self._work:
            for job in jobs:
                if not job.generation.ended:
                    job.generation.jobs.append(job)
                    self._batcher.add(job)
            self._work.notify()

    def _texts(self, request: GenerationRequest) -> list[Text]:
        """What conditions the rows: the prompt and, with two, what guidance leads away from."""
        if self.config.timestep_cond:
            guided = bool(request.negative_prompt)  # else the embedding carries the guidance
        else:
            guided = request.guidance_scale != 1
        texts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        return [Text(text, alone=request.deterministic) for text in texts]

    def _jobs(self, generation: Generation, hidden: np.ndarray) -> list[_Job]:
        """The images of a request, conditioned on `hidden` (rows, L, D)."""
        request, config = generation.request, self.config
        rows, embedding = len(hidden), None
        if config.timestep_cond:
            told = request.guidance_scale if rows == 1 else 1.0
            embedding = np.tile(guidance_embedding(told, config.timestep_cond), (rows, 1))
        height, width = request.height // config.scale_factor, request.width // config.scale_factor
        capacity = rows if request.deterministic else self._capacity(request).rows
        return [
            _Job(
                group=(height, width, rows if request.deterministic else 0),
                rows=rows,
                steps=request.steps,
                capacity=capacity,
                trajectory=trajectory(request.sampler, config.schedule, request.steps),
                hidden=hidden,
                timestep_cond=embedding,
                guidance_scale=request.guidance_scale,
                noise=np.random.default_rng(request.seed + index),
                shape=(config.latent_channels, height, width),
                generation=generation,
                index=index,
            )
            for index in range(request.num_images)
        ]

    def _capacity(self, request: GenerationRequest) -> Capacity:
        side = max(request.height, request.width)
        return next(capacity for capacity in self._capacities if side <= capacity.side)

    # Denoise ----------------------------------------------------------------------------

    def _denoise_loop(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or len(self._batcher))
                if self._closing:
                    return
                jobs = self._batcher.next_batch()
            most = self._capacity(jobs[0].generation.request).rows
            buckets = [*(size for size in self._buckets if size < most), most]
            try:
                denoise_step(self._models, jobs, buckets if self._buckets else ())
            except Exception:
                self._fail([job.generation for job in jobs], "denoising")
                continue
            for job in jobs:
                if job.generation.ended:
                    continue
                self._report(job)
                if job.step == job.steps:
                    self._to_decode.put(job)

    def _report(self, job: _Job) -> None:
        request, done = job.generation.request, job.step == job.steps
        every = request.preview_every
        if every and job.step % every == 0 and not done:
            event = partial(self._preview, job, job.step, job.clean)
        elif request.progress:
            event = partial(Progress, job.index, job.step, job.steps)
        else:
            return
        self._to_reply.put((job.generation, event))

    def _preview(self, job: _Job, step: int, clean: np.ndarray) -> Progress:
        pixels = images.preview(clean, self._latent_to_rgb)
        image = images.encode(pixels, job.generation.request.image_format)
        return Progress(job.index, step, job.steps, image)

    # Decode -----------------------------------------------------------------------------

    def _decode_loop(self) -> None:
        for batch in _batches(self._to_decode):
            groups: dict[Hashable, list[_Job]] = {}
            for job in batch:
                groups.setdefault(job.group, []).append(job)
            for jobs in groups.values():
                most = decoder_pictures(jobs[0].capacity)  # 1 where calls are not shared
                for i in range(0, len(jobs), most):
                    self._decode(jobs[i : i + most])

    def _decode(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if not job.generation.ended]
        if not jobs:
            return
        try:
            latent = np.stack([job.x for job in jobs])
            decoded = self._models.run("vqgan_decoder", {"latent": latent}, "image")
        except Exception:
            self._fail([job.generation for job in jobs], "decoding")
            return
        for job, image in zip(jobs, decoded, strict=True):
            self._to_reply.put((job.generation, partial(_finished, job, image)))

    # Reply ------------------------------------------------------------------------------

    def _reply_loop(self) -> None:
        while (item := self._to_reply.get()) is not None:
            generation, make_event = item
            try:
                event = make_event()
                if generation.ended and not isinstance(event, End):
                    continue
                generation.reply(event)
            except Exception:
                self._fail([generation], "answering")
                continue
            if isinstance(event, Finished):
                generation.images_left -= 1
                if not generation.images_left:
                    self._end(generation, None)

    def _end(self, generation: Generation, error: EngineError | None) -> None:
        with self._work:
            if generation.ended:
                return
            generation.ended = True
            self._live.discard(generation)
            for job in generation.jobs:
                self._batcher.remove(job)
            generation.jobs.clear()  # which hold it in turn, and the latents of whole calls
            self._to_reply.put((generation, partial(End, error)))  # before `close` stops the queue

    def _fail(self, generations: Iterable[Generation], doing: str) -> None:
        error = sys.exception()
        if not isinstance(error, EngineError):
            log.exception("%s failed", doing)
            error = EngineError("INTERNAL", f"{doing} failed: the server's log says why")
        for generation in generations:
            self._end(generation, error)

    def _warnings(self, request: GenerationRequest) -> Iterator[str]:
        yield from self._tokenizer.warnings("prompt", request.prompt)
        yield from self._tokenizer.warnings("negative_prompt", request.negative_prompt)
        if request.negative_prompt and request.guidance_scale == 1:
            yield "negative_prompt has no effect at guidance_scale 1"


def _finished(job: _Job, image: np.ndarray) -> Finished:
    generation = job.generation
    request = generation.request
    data = images.encode(images.to_pixels(image), request.image_format)
    return Finished(job.index, request.seed + job.index, data, generation.warnings)


def _batches(waiting: queue.SimpleQueue) -> Iterator[list]:
    """All that waits, each time that something does, until None comes."""
    while True:
        batch = [waiting.get()]
        while not waiting.empty():
            batch.append(waiting.get())
        yield [item for item in batch if item is not None]
        if None in batch:
            return
