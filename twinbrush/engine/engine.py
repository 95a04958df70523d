"""The engine: tokenize, encode, denoise, decode, reply, for many requests at once.

Each stage is a loop in a thread of its own, so encoding, decoding and replying run beside the
next UNet call. It sees networks through `Models` and clients through a `reply` callback; it knows
nothing of Triton.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twinbrush.engine import images
from twinbrush.engine.admission import Admission
from twinbrush.engine.batcher import CallKey, Claim, StepBatcher
from twinbrush.engine.capacity import LEAST_ROWS
from twinbrush.engine.conditioning import Conditioner
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.costs import Costs
from twinbrush.engine.decode import Decoder, LiveImage
from twinbrush.engine.denoise import Denoiser, Painting
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.engine.image_cache import ImageCache
from twinbrush.engine.intake import Intake
from twinbrush.engine.limits import Limits
from twinbrush.engine.memory import DeviceMemory
from twinbrush.engine.metrics import Observer, Unobserved
from twinbrush.engine.models import Models
from twinbrush.engine.plan import Planner
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.engine.request import GenerationRequest
from twinbrush.engine.request_ids import named
from twinbrush.engine.telemetry import ObservedModels, Telemetry
from twinbrush.engine.threads import Watchdog, start_guarded
from twinbrush.engine.tracing import Origin, Tracer
from twinbrush.engine.turns import NoTurns, Stage, Turns

log = logging.getLogger(__name__)

MEGABYTE = 2**20
# How runtimes word that memory is exhausted.
OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "bad_alloc", "memoryerror")
WORTH_A_WAIT = 0.03  # of a UNet call's time, for newcomers who would wait as long as the call


class Engine:
    """Runs requests against `models`.

    Args:
        models: the served networks.
        config: the checkpoint.
        tokenizer: its tokenizers.
        limits: bounds on calls and queues.
        fail: called with a sentence when the engine cannot go on, because a thread died or a
            model call does not return; by default every request ends with INTERNAL.
        beat: called about twice a second while the engine is well.
        observer: takes the values of the metrics.
        tracer: takes the spans of traces.
        one_call_at_a_time: whether the stages take turns with their calls, see `turns`: where
            `models` runs them on one accelerator.
    """

    def __init__(
        self,
        models: Models,
        config: PipelineConfig,
        tokenizer: PromptTokenizer,
        limits: Limits | None = None,
        fail: Callable[[str], None] | None = None,
        beat: Callable[[], None] = lambda: None,
        observer: Observer | None = None,
        tracer: Tracer | None = None,
        one_call_at_a_time: bool = False,
    ):
        limits = limits or Limits()
        self.config = config = limits.bounded(config)
        self._limits, self._tokenizer = limits, tokenizer
        self._plan = Planner(config, limits.max_rows, limits.memory)
        if (memory := self._plan.memory) is not None:
            log.info("calls are bounded by memory: %s", memory.describe())
            if memory.largest < config.cells(config.native_width, config.native_height):
                log.warning(
                    "pictures of the native size are refused: memory_mb leaves no room for them"
                )
        self._fail = fail or self._give_up
        self._latent_to_rgb = np.array(config.latent_to_rgb, np.float32)
        self._costs = Costs()
        self._telemetry = Telemetry(observer or Unobserved(), config, tracer)
        cache_bytes = limits.prompt_cache_mb * MEGABYTE
        self._telemetry.limits(cache_bytes, memory and memory.budget)
        models = ObservedModels(models, self._telemetry)
        self._work = threading.Condition()  # guards what follows, and every `ended`
        self._batcher = StepBatcher(self._call_rows, self._costs.seconds)
        self._admission = Admission(limits.queue_size, limits.queue_work, limits.client_work / 100)
        self._images: dict[Claim, LiveImage] = {}
        self._reduced: dict[CallKey, int] = {}  # rows a call, since memory was exhausted
        self._closed: EngineError | None = None
        self._draining = False
        self._watchdog = Watchdog(
            models, limits.call_seconds, self._fail, partial(self._tick, beat)
        )
        self._turns: Turns | NoTurns = Turns() if one_call_at_a_time else NoTurns()
        self._may_renew = one_call_at_a_time
        self._conditioner = Conditioner(
            self._watchdog, config, tokenizer, limits.max_rows, self._telemetry,
            cache_bytes,
        )  # fmt: skip
        self._image_cache = ImageCache(limits.image_cache_mb * MEGABYTE)
        self._denoiser = Denoiser(self._watchdog, partial(self._turns.take, Stage.DENOISE))
        self._to_reply: queue.SimpleQueue = queue.SimpleQueue()
        self._decoder = Decoder(
            self._watchdog,
            partial(self._turns.take, Stage.DECODE),
            config,
            self._pictures,
            self._finish,
            self._end_failed,
        )
        self._intake = Intake(
            self._plan, self._conditioner, self._turns, limits.max_rows,
            self._draw_first_noise, self._others, self._add, self._end_failed,
        )  # fmt: skip
        loops = (self._intake.loop, self._denoise_loop, self._decoder.loop, self._reply_loop)
        self._threads = [start_guarded(loop.__qualname__, loop, self._fail) for loop in loops]

    @classmethod
    def of_model(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        models: Models,
        device: DeviceMemory | None = None,
        **options: Any,
    ) -> Engine:
        """The engine of a served model: its version folder, and its `config.pbtxt` as JSON.

        `device` says what the networks may take of memory, where the configuration does not;
        `options` are those of the class.

        Raises:
            ValueError: a file of the folder, or a parameter, is not as it must be.
        """
        pipeline = PipelineConfig.load(folder / "pipeline.json")
        tokenizer = PromptTokenizer(folder, pipeline)
        return cls(models, pipeline, tokenizer, Limits.of_config(config, device), **options)

    def submit(
        self,
        request: GenerationRequest,
        reply: Callable[[Event], None],
        origin: Origin = Origin(),  # noqa: B008 (it is frozen)
    ) -> Generation:
        """Takes a request and returns at once.

        `reply` receives its events in order from one thread, `End` last and exactly once. Logs
        and traces name it by its `origin`.

        Raises:
            InvalidArgument: its pictures do not fit into memory.
            EngineError: UNAVAILABLE when the engine drains or has closed, RESOURCE_EXHAUSTED when
                its queue is full, DEADLINE_EXCEEDED when the deadline cannot be met.
        """
        try:
            self._plan.check_memory(request)
        except InvalidArgument:
            self._telemetry.refused("memory")
            raise
        warnings = (
            *self._tokenizer.warnings("prompt", request.prompt, request.syntax),
            *self._tokenizer.warnings("negative_prompt", request.negative_prompt, request.syntax),
            *self._plan.warnings(request),
        )
        files = self._cached_files(request)
        work = 0.0 if files else self._plan.work(request)
        generation = Generation(request, work, warnings, reply, self._end, origin)
        if request.deadline_ms:
            generation.deadline = generation.submitted + request.deadline_ms / 1000
        try:
            with self._work:
                if self._closed or self._draining:
                    raise self._closed or EngineError.of_shutdown()
                self._admission.add(generation, generation.submitted)
        except EngineError as error:
            self._telemetry.refused(error.reason)
            raise
        for index, file in enumerate(files):
            self._send(generation, index, file)
        if not files:
            self._intake.put(generation)
        return generation

    def check_room(self) -> None:
        """Refuses what `submit` would refuse whatever it asks for, before it is read.

        Raises:
            EngineError: as `submit`.
        """
        try:
            with self._work:
                if self._closed or self._draining:
                    raise self._closed or EngineError.of_shutdown()
                self._admission.check_room()
        except EngineError as error:
            self._telemetry.refused(error.reason)
            raise

    def _cached_files(self, request: GenerationRequest) -> list[bytes]:
        """The files of a deterministic request that was answered before, where they are kept."""
        if not self._image_cache.holds(request):
            return []
        files = self._image_cache.get(request)
        self._telemetry.image_cache(request.num_images, hit=bool(files))
        return files

    def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for the live ones; returns whether all have ended."""
        with self._work:
            self._draining = True
            return self._work.wait_for(lambda: not self._admission.live, seconds)

    def close(self) -> None:
        """Ends every live request with UNAVAILABLE and stops the threads."""
        self._end_all(EngineError.of_shutdown())
        self._intake.close()
        self._decoder.close()
        for thread in self._threads[:-1]:
            thread.join()
        self._to_reply.put(None)
        self._threads[-1].join()
        self._conditioner.close()
        self._denoiser.close()
        self._watchdog.close()

    def _give_up(self, reason: str) -> None:
        self._end_all(EngineError("INTERNAL", f"the engine has stopped: {reason}"))

    def _end_all(self, error: EngineError) -> None:
        with self._work:
            self._closed = error
            live = list(self._admission.live)
            self._work.notify_all()
        for generation in live:
            self._end(generation, error)

    def _tick(self, beat: Callable[[], None]) -> None:
        """Ends requests that are past their deadline, and records what waits."""
        self._end_overdue()
        with self._work:
            self._telemetry.waiting(self._batcher.waiting, self._batcher.waiting_rows)
            self._telemetry.work(
                self._admission.outstanding, self._limits.queue_work, len(self._reduced)
            )
        beat()

    def _end_overdue(self) -> None:
        with self._work:
            overdue = self._admission.overdue(time.monotonic())
        for generation in overdue:
            text = f"deadline_ms={generation.request.deadline_ms} has passed"
            self._end(generation, EngineError("DEADLINE_EXCEEDED", text))

    # Encode -----------------------------------------------------------------------------

    def _others(self, newcomers: int) -> int:
        """Requests that are being made beside newcomers; none where no image is."""
        with self._work:
            return len(self._admission.live) - newcomers if len(self._batcher) else 0

    def _draw_first_noise(self, paintings: Sequence[Painting]) -> Future:
        """Draws it beside the encoders, for as many as a call holds: what waits stays small."""
        few = paintings[: max(0, self._limits.max_rows - len(self._images))]
        return self._denoiser.draw_first(few)

    def _add(self, made: Sequence[LiveImage]) -> None:
        with self._work:
            for image in made:
                if not image.generation.ended:
                    image.generation.claims.append(image.claim)
                    image.claim.deadline = image.generation.deadline
                    self._images[image.claim] = image
                    self._batcher.add(image.claim)
            self._work.notify_all()

    # Denoise ----------------------------------------------------------------------------

    def _denoise_loop(self) -> None:
        while True:
            self._end_overdue()
            with self._work:
                self._work.wait_for(lambda: self._closed or len(self._batcher))
                if self._closed:
                    return
                began = time.monotonic()
                call = [self._images[claim] for claim in self._batcher.schedule(began)]
            self._denoise(call, self._may_renew)
            self._telemetry.tick(time.monotonic() - began)

    def _denoise(self, call: Sequence[LiveImage], may_renew: bool = False) -> None:
        """One UNet call; with `may_renew`, images join and leave it while it waits for its turn."""
        key, call = call[0].claim.key, list(call)
        renew = partial(self._renew, call) if may_renew else lambda: None
        started = time.monotonic()
        try:
            paintings = [image.painting for image in call]
            taken = self._denoiser.step(key.model, paintings, self._buckets(key), renew)
        except Exception as error:
            self._retry(call, error)
            return
        counts = [image.painting.rows_at(image.painting.calls - 1) for image in call]
        with self._work:
            ended = time.monotonic()
            seconds = ended - started
            self._admission.observe(self._plan.call_work(key, sum(counts)), seconds)
            self._costs.observe(key, sum(counts), taken)
            self._batcher.advance([image.claim for image in call])
            for image, count in zip(call, counts, strict=True):
                image.marks.denoising = image.marks.denoising or started
                image.marks.call_began, image.marks.denoised = started, ended
                self._admission.complete(image.generation, self._plan.call_work(key, count))
                if image.painting.finished:
                    self._images.pop(image.claim, None)
        self._telemetry.unet_call(
            key, sum(counts), self._rows(key),
            [image.marks for image in call], [image.generation.request_id for image in call],
        )  # fmt: skip
        if self._plan.memory is not None:
            self._telemetry.memory_used(self._plan.memory.used(key.cells, sum(counts)))
        for image in call:
            if not image.generation.ended:
                self._report(image)
                if image.painting.finished:
                    self._decoder.put(image)

    def _renew(self, call: list[LiveImage]) -> list[Painting] | None:
        """The paintings of a call whose turn has come, if others have come or gone meanwhile."""
        with self._work:
            seconds = self._costs.seconds(call[0].claim.key, len(call))
        self._intake.wait_for_encoded(WORTH_A_WAIT * seconds)
        with self._work:
            left = [image for image in call if not image.generation.ended]
            joined = self._batcher.join([image.claim for image in left]) if left else []
            if not left or (not joined and len(left) == len(call)):
                return None
            call[:] = [*left, *(self._images[claim] for claim in joined)]
        return [image.painting for image in call]

    def _retry(self, call: Sequence[LiveImage], error: Exception) -> None:
        """Tries each half of a failed call, down to the images at fault, which fail alone."""
        key = call[0].claim.key
        if any(text in repr(error).lower() for text in OUT_OF_MEMORY):
            self._reduce_rows(key, sum(image.painting.rows for image in call))
        if len(call) == 1 or isinstance(error, EngineError):
            self._end_failed([image.generation for image in call], "denoising")
            return
        self._telemetry.call_retried()
        log.warning(
            "a UNet call of %d images failed: trying halves: %s",
            len(call), _named(image.generation for image in call), exc_info=True,
        )  # fmt: skip
        for half in (call[: len(call) // 2], call[len(call) // 2 :]):
            if left := [image for image in half if not image.generation.ended]:
                self._denoise(left)

    def _call_rows(self, key: CallKey) -> int:
        """Rows of a UNet call: those that memory allows, fewer where more gain nothing."""
        return self._costs.enough_rows(key, self._rows(key))

    def _rows(self, key: CallKey) -> int:
        most = self._plan.rows(key)
        return min(most, self._reduced.get(key, most))

    def _pictures(self, key: CallKey) -> int:
        return self._plan.pictures(key, self._rows(key))

    def _reduce_rows(self, key: CallKey, failed: int) -> None:
        """Later calls have at most half of the rows of one that ran out of memory."""
        with self._work:
            rows = self._reduced[key] = max(LEAST_ROWS, min(failed, self._rows(key)) // 2)
        log.error(
            "a UNet call of %d rows ran out of memory: calls of %s have at most %d rows now",
            failed, key, rows,
        )  # fmt: skip

    def _buckets(self, key: CallKey) -> Sequence[int]:
        most = self._rows(key)
        buckets = self._limits.row_buckets
        return (*(size for size in buckets if size < most), most) if buckets else ()

    def _report(self, image: LiveImage) -> None:
        request, painting = image.generation.request, image.painting
        if not painting.trajectory.ends_step[painting.calls - 1]:
            return
        every, step = request.preview_every, painting.steps
        if every and step % every == 0 and not painting.finished:
            event = partial(self._preview, image, step, painting.latent.clean)
        elif request.progress:
            event = partial(Progress, image.index, step, request.steps)
        else:
            return
        self._to_reply.put((image.generation, event))

    def _preview(self, image: LiveImage, step: int, clean: np.ndarray) -> Progress:
        request = image.generation.request
        pixels = images.preview(clean, self._latent_to_rgb)
        return Progress(
            image.index, step, request.steps, images.encode(pixels, request.image_format)
        )

    # Reply ------------------------------------------------------------------------------

    def _finish(self, image: LiveImage, data: bytes) -> None:
        generation = image.generation
        image.marks.finished = time.monotonic()
        generation.finished[image.index] = image.marks
        self._telemetry.image_finished(image.claim.key, image.marks)
        self._image_cache.add(generation.request, image.index, data)
        self._send(generation, image.index, data)

    def _send(self, generation: Generation, index: int, file: bytes) -> None:
        event = Finished(index, generation.request.seed + index, file, generation.warnings)
        self._to_reply.put((generation, lambda: event))

    def _reply_loop(self) -> None:
        while (item := self._to_reply.get()) is not None:
            generation, make_event = item
            try:
                event = make_event()
                if generation.ended and not isinstance(event, End):
                    continue
                generation.reply(event)
            except Exception:
                self._end_failed([generation], "replying")
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
            self._admission.remove(generation)
            for claim in generation.claims:
                self._batcher.remove(claim)
                self._images.pop(claim, None)
            generation.claims.clear()
            self._to_reply.put((generation, partial(End, error)))  # before `close` stops the queue
            self._work.notify_all()
        self._telemetry.request_ended(generation.trace(error), generation.work)

    def _end_failed(
        self,
        generations: Iterable[Generation],
        stage: str,
        reason: str = "the server's log says why",
    ) -> None:
        """Ends requests with the exception that is being handled; clients see the reason."""
        error, generations = sys.exception(), list(generations)
        if not isinstance(error, EngineError):
            log.exception("%s failed: %s", stage, _named(generations))
            error = EngineError("INTERNAL", f"{stage} failed: {reason}")
        for generation in generations:
            self._end(generation, error)


def _named(generations: Iterable[Generation]) -> str:
    return named(generation.request_id for generation in generations)
