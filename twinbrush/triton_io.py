"""Triton's side of both front doors: tensors in, events out, calls to the served networks.

The only file of this package that names `pb_utils`. Knows nothing of diffusion.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.cancel_watch import CancelWatch
from twinbrush.engine import Engine
from twinbrush.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.relay import RelayClient, RelayServer, relay_address
from twinbrush.request import GenerationRequest, InvalidArgument

log = logging.getLogger(__name__)
# What the networks of a server answer that has been told to end while requests live.
SHUTDOWN = ("Server not ready", "Server is stopping")
DTYPES = {"index": np.int32, "step": np.int32, "total_steps": np.int32, "seed": np.int64}


class TritonModels:
    """`Models` that are called inside the server (business logic scripting)."""

    def run(self, model: str, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[output],
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(t)) for name, t in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            reason = response.error().message()
            if any(text in reason for text in SHUTDOWN):
                raise EngineError.of_shutdown()
            raise RuntimeError(f"{model}: {reason}")
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


class RequestMetrics:
    """What `/metrics` tells of a model's requests; Triton itself counts each as a success.

    One thread makes all changes, beside the requests: the server dies of two at once. Without
    metrics in the server it tells nothing.
    """

    def __init__(self, model: str):
        self._model = model
        self._told: queue.SimpleQueue[str | None] | None = None  # None: a request begins
        kinds = pb_utils.MetricFamily
        try:
            self._live = kinds(
                "twinbrush_requests_live", "Requests that have no end yet", kinds.GAUGE
            )
            self._ended = kinds(
                "twinbrush_requests_ended_total", "Requests by how they ended", kinds.COUNTER
            )
        except pb_utils.TritonModelException:
            log.warning("the server has no metrics: requests are not counted")
            return
        self._told = queue.SimpleQueue()
        threading.Thread(target=self._count, args=[self._told], name="metrics", daemon=True).start()

    def began(self) -> None:
        if self._told is not None:
            self._told.put(None)

    def ended(self, code: str) -> None:
        if self._told is not None:
            self._told.put(code)

    def _count(self, told: queue.SimpleQueue) -> None:
        live, ended = self._live.Metric({"model": self._model}), {}
        while True:
            if (code := told.get()) is None:
                live.increment(1)
                continue
            if code not in ended:
                ended[code] = self._ended.Metric({"model": self._model, "code": code})
            ended[code].increment(1)
            live.increment(-1)


class Answer:
    """How one request is answered, by responses and exactly one end."""

    def __init__(self, request: Any, metrics: RequestMetrics):
        self._sender = request.get_response_sender()
        self._open = True
        self._lock = threading.Lock()
        self._metrics = metrics
        metrics.began()

    def send(self, outputs: Mapping[str, Any], final: bool = False) -> None:
        tensors = [
            pb_utils.Tensor(name, np.array(value, DTYPES.get(name, object)).reshape(-1))
            for name, value in outputs.items()
        ]
        self._respond(pb_utils.InferenceResponse(tensors), "OK" if final else None)

    def fail(self, error: EngineError) -> None:
        failure = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        self._respond(pb_utils.InferenceResponse(error=failure), error.code)

    def end(self) -> None:
        self._respond(None, "OK")

    def cancelled(self) -> bool:
        """Whether the client has cancelled; False once answered.

        The server dies of the question when it comes after the end, hence the lock.
        """
        with self._lock:
            return self._open and self._sender.is_cancelled()

    def _respond(self, response: Any, ends_with: str | None) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if ends_with else 0
        with self._lock:
            ends = self._open and ends_with
            self._open = self._open and not ends_with
            try:
                self._sender.send(response, flags=flags)
            except Exception:
                if ends:
                    self._metrics.ended("INTERNAL")
                raise
        if ends:
            self._metrics.ended(ends)


class StreamModel:
    """`text_to_image_stream`: decoupled, every event of a request is a response of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        _log_to_the_server(args["model_name"])
        self._metrics = RequestMetrics(args["model_name"])
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        self._inputs = _input_names(config)
        self._engine = Engine.of_model(folder, config, TritonModels())
        self._relay = RelayServer(relay_address(), self._submit)
        self._watch = CancelWatch()
        self._live: dict[Answer, tuple[str, Generation]] = {}  # and the id that the client gave

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = Answer(request, self._metrics)
            try:
                self._start(request, answer)
            except Exception as error:
                answer.fail(EngineError.of(error))

    def finalize(self) -> None:
        self._relay.close()
        self._engine.close()
        self._watch.close()

    def _start(self, request: Any, answer: Answer) -> None:
        fields = _fields(request, self._inputs)
        if (target := fields.pop("cancel", None)) is not None:
            self._cancel(target, fields, answer)
            return
        request_id = request.request_id()

        def forget() -> None:
            self._watch.discard(answer)
            self._live.pop(answer, None)

        def reply(event: Event) -> None:
            if isinstance(event, End):
                forget()
            _tell(answer, event)

        generation = self._submit(fields, reply)
        if request_id:
            self._live[answer] = request_id, generation
        self._watch.add(answer, generation.cancel)
        if generation.ended:  # before it was known here
            forget()

    def _submit(self, fields: dict[str, np.ndarray], reply: Callable[[Event], None]) -> Generation:
        request = GenerationRequest.parse(fields, self._engine.config)
        return self._engine.submit(request, reply)

    def _cancel(self, target: np.ndarray, others: dict[str, Any], answer: Answer) -> None:
        name = target.reshape(-1)[0].decode("utf-8", "replace")
        if others:
            raise InvalidArgument("cancel", name, "it must be the only input of its request")
        named = [generation for given, generation in list(self._live.values()) if given == name]
        if not named:
            raise EngineError("NOT_FOUND", f"no live request has the id {name!r}")
        for generation in named:
            generation.cancel()
        answer.send({"event": b"cancelled"}, final=True)


class UnaryModel:
    """`text_to_image`: one response with all images, which `text_to_image_stream` makes."""

    def initialize(self, args: dict[str, str]) -> None:
        _log_to_the_server(args["model_name"])
        self._metrics = RequestMetrics(args["model_name"])
        self._inputs = _input_names(json.loads(args["model_config"]))
        self._relay = RelayClient(relay_address())
        self._watch = CancelWatch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = Answer(request, self._metrics)
            try:
                self._start(_fields(request, self._inputs), answer)
            except Exception as error:
                self._watch.discard(answer)
                answer.fail(EngineError.of(error))

    def finalize(self) -> None:
        self._relay.close()
        self._watch.close()

    def _start(self, fields: dict[str, np.ndarray], answer: Answer) -> None:
        def done(outcome: list[Finished] | EngineError) -> None:
            self._watch.discard(answer)
            if isinstance(outcome, EngineError):
                answer.fail(outcome)
            else:
                answer.send(_stacked(outcome), final=True)

        ticket = self._relay.new_ticket()
        self._watch.add(answer, lambda: self._relay.cancel(ticket))
        self._relay.submit(ticket, fields | {"progress": np.array([False])}, done)


def _stacked(images: list[Finished]) -> dict[str, Any]:
    return {
        "image": [image.image for image in images],
        "seed": [image.seed for image in images],
        "warning": "; ".join(images[0].warnings).encode(),
    }


def _input_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(tensor["name"] for tensor in config["input"])


def _fields(request: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Copies of the inputs that a request brings: the server takes back its memory.

    Raises:
        InvalidArgument: a JSON body had a member that is no input; the server makes such
            members parameters of the request, and `id`, which it takes for the request's, too.
    """
    for name, value in json.loads(request.parameters() or "{}").items():
        if name != "id" and not name.startswith("triton_"):
            raise InvalidArgument(name, value, f"inputs are {', '.join(names)}")
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: t.as_numpy().copy() for name, t in tensors.items() if t is not None}


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


def _log_to_the_server(name: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{name}: %(levelname)s %(message)s"
    )
