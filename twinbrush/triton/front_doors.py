"""The two front doors: Triton's requests become the engine's, its events become responses."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from twinbrush import otlp, runtime_choice
from twinbrush.control import Beat, Control
from twinbrush.engine import limits
from twinbrush.engine.config import check_names
from twinbrush.engine.engine import Engine
from twinbrush.engine.fields import InvalidArgument
from twinbrush.engine.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.engine.metrics import (
    METRICS,
    REFUSALS,
    REQUESTS_ENDED,
    REQUESTS_LIVE,
    Observer,
)
from twinbrush.engine.models import PlacedModels
from twinbrush.engine.request import (
    GenerationRequest,
    describe_server,
    explaining_generated_inputs,
)
from twinbrush.engine.request_ids import LineFormatter
from twinbrush.engine.threads import Pulse
from twinbrush.engine.tracing import Origin
from twinbrush.memory import device_memory
from twinbrush.orphans import end_with_server
from twinbrush.triton import incoming
from twinbrush.triton.answer import Answer, RequestMetrics
from twinbrush.triton.cancel_watch import CancelWatch
from twinbrush.triton.metrics import TritonMetrics
from twinbrush.triton.networks import open_models
from twinbrush.triton.relay import RelayClient, RelayServer, relay_address

log = logging.getLogger(__name__)
PARAMETERS = (*limits.PARAMETERS, runtime_choice.PARAMETER, otlp.PARAMETER)
UNARY_METRICS = (REQUESTS_LIVE, REQUESTS_ENDED, REFUSALS)


class StreamModel:
    """`text_to_image_stream`: decoupled, every event of a request is a response of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        end_with_server()
        _log_to_the_server(args["model_name"])
        self._observer = TritonMetrics(METRICS, _end_process)
        self._metrics = RequestMetrics(self._observer, args["model_name"])
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        check_names(config, PARAMETERS)
        self._inputs = _input_names(config)
        self._control = Control.from_environment()
        beat = Beat(self._control, args["model_name"], self._drain)
        self._streamed = 0.0  # when a stream was answered last, by the monotonic clock
        self._tracer = otlp.open_tracer(config)
        models = self.open_models(folder, config)
        self._engine = Engine.of_model(
            folder, config, models, device_memory(),
            fail=_end_process, beat=beat, observer=self._observer, tracer=self._tracer,
            one_call_at_a_time=models.on_accelerator,
        )  # fmt: skip
        self._relay = RelayServer(relay_address(), self._submit)
        self._watch = CancelWatch(_end_process)
        self._live: dict[Answer, tuple[str, Generation]] = {}  # and the id that the client gave
        beat()  # before the server is ready: a launcher that has seen no beat cannot drain it

    def open_models(self, folder: Path, config: Mapping[str, Any]) -> PlacedModels:
        """The networks behind the engine in `folder`, by the parameter `runtime`."""
        return open_models(folder.parent, config, _end_process)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = Answer(request, self._metrics, streams=True)
            try:
                self._start(request, answer)
            except Exception as error:
                answer.fail(EngineError.of(error, answer.request_id))

    def finalize(self) -> None:
        self._relay.close()
        self._engine.close()
        self._watch.close()
        self._observer.close()
        if self._tracer is not None:
            self._tracer.close()

    def _drain(self) -> bool:
        """See `Beat`; what is left of traces is sent before the server is killed."""
        drained = self._engine.drain(0) and (self._tracer is None or self._tracer.flushed())
        if drained and self._control is not None:
            self._control.report_streamed(self._streamed)
        return drained

    def _start(self, request: Any, answer: Answer) -> None:
        fields, origin = _read(request, answer, self._inputs, self._observer)
        if (target := fields.pop("cancel", None)) is not None:
            with _refusals(self._observer):
                self._cancel(target, fields, answer)
            return
        if (wanted := fields.pop("info", None)) is not None:
            with _refusals(self._observer):
                self._describe(wanted, fields, answer)
            return
        request_id = request.request_id()

        def forget() -> None:
            self._watch.discard(answer)
            self._live.pop(answer, None)

        def reply(event: Event) -> None:
            if isinstance(event, End):
                forget()
                self._streamed = time.monotonic()
            _tell(answer, event)

        generation = self._submit(fields, reply, origin)
        if request_id:
            self._live[answer] = request_id, generation
        self._watch.add(answer, generation.cancel)
        if generation.ended:  # before it was known here
            forget()

    def _submit(
        self, fields: dict[str, np.ndarray], reply: Callable[[Event], None], origin: Origin
    ) -> Generation:
        self._engine.check_room()
        with _refusals(self._observer):
            request = GenerationRequest.parse(fields, self._engine.config)
        return self._engine.submit(request, reply, origin)

    def _cancel(self, target: np.ndarray, others: dict[str, Any], answer: Answer) -> None:
        name = target.reshape(-1)[0].decode("utf-8", "replace")
        if others:
            with explaining_generated_inputs(others):
                raise InvalidArgument("cancel", name, "must be the only input of its request")
        named = [generation for given, generation in list(self._live.values()) if given == name]
        if not named:
            raise EngineError("NOT_FOUND", f"no live request has the id {name!r}")
        for generation in named:
            generation.cancel()
        answer.send({"event": b"cancelled"}, final=True)

    def _describe(self, wanted: np.ndarray, others: dict[str, Any], answer: Answer) -> None:
        if others or not wanted.all():
            raise InvalidArgument("info", bool(wanted.all()), "must be true and the only input")
        described = json.dumps(describe_server(self._engine.config))
        answer.send({"event": b"info", "info": described.encode()}, final=True)


class UnaryModel:
    """`text_to_image`: one response with all images, which `text_to_image_stream` makes."""

    def initialize(self, args: dict[str, str]) -> None:
        end_with_server()
        _log_to_the_server(args["model_name"])
        self._observer = TritonMetrics(UNARY_METRICS, _end_process)
        self._metrics = RequestMetrics(self._observer, args["model_name"])
        self._inputs = _input_names(json.loads(args["model_config"]))
        self._relay = RelayClient(relay_address())
        self._watch = CancelWatch(_end_process)
        self._pulse = Pulse(Beat(Control.from_environment(), args["model_name"]), _end_process)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = Answer(request, self._metrics)
            try:
                self._check_room()
                self._start(request, answer)
            except Exception as error:
                self._watch.discard(answer)
                answer.fail(EngineError.of(error, answer.request_id))

    def finalize(self) -> None:
        self._pulse.close()
        self._relay.close()
        self._watch.close()
        self._observer.close()

    def _check_room(self) -> None:
        """Raises EngineError while the engine's queue is known to be full, at no cost to it."""
        refusal = self._relay.refusal
        if refusal is not None:
            self._observer.record(REFUSALS, 1, "queue_full")
            raise refusal

    def _start(self, request: Any, answer: Answer) -> None:
        fields, origin = _read(request, answer, self._inputs, self._observer)

        def done(outcome: list[Finished] | EngineError) -> None:
            self._watch.discard(answer)
            try:
                if isinstance(outcome, EngineError):
                    raise outcome
                answer.send(_stacked(outcome), final=True)
            except EngineError as error:
                answer.fail(error)

        ticket = self._relay.new_ticket()
        self._watch.add(answer, lambda: self._relay.cancel(ticket))
        fields |= {"progress": np.array([False])}
        self._relay.submit(ticket, fields, done, origin)


def _stacked(images: list[Finished]) -> dict[str, Any]:
    return {
        "image": [image.image for image in images],
        "seed": [image.seed for image in images],
        "warning": "; ".join(images[0].warnings).encode(),
    }


def _input_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(tensor["name"] for tensor in config["input"])


@contextmanager
def _refusals(observer: Observer) -> Iterator[None]:
    """Counts an invalid request as refused."""
    try:
        yield
    except InvalidArgument:
        observer.record(REFUSALS, 1, "invalid")
        raise


def _read(
    request: Any, answer: Answer, names: tuple[str, ...], observer: Observer
) -> tuple[dict[str, np.ndarray], Origin]:
    """A request's inputs, copied, and its origin; an invalid request is counted as refused.

    Raises:
        InvalidArgument: see `incoming.read`.
    """
    with _refusals(observer):
        fields, parent = incoming.read(request, names)
    return fields, Origin(answer.request_id, parent)


def _tell(answer: Answer, event: Event) -> None:
    match event:
        case Progress(index, step, total_steps, image):
            outputs = {"index": index, "step": step, "total_steps": total_steps}
            if image is None:
                answer.send({"event": b"progress", **outputs})
            else:
                answer.send({"event": b"preview", **outputs, "image": image})
        case Finished(index, seed, image, warnings):
            warning = "; ".join(warnings).encode()
            outputs = {"index": index, "seed": seed, "image": image, "warning": warning}
            answer.send({"event": b"image", **outputs})
        case End(None):
            answer.end()
        case End(EngineError() as error):
            answer.fail(error)


def _end_process(reason: str) -> None:
    """Ends this stub, so that the launcher starts a server that works."""
    log.critical("the engine cannot go on: %s", reason)
    logging.shutdown()
    os._exit(1)


def _log_to_the_server(name: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(name))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
