"""Triton's side of both front doors: tensors in, events out, calls to the served networks.

The only file of this package that names `pb_utils`. Knows nothing of diffusion.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.config import PipelineConfig
from twinbrush.engine import Engine
from twinbrush.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.prompt import PromptTokenizer
from twinbrush.request import FIELDS, GenerationRequest, InvalidArgument

log = logging.getLogger(__name__)
STREAM = "text_to_image_stream"
# Requests that the unary front door hands on are cancelled by id: their own senders never
# tell of a cancel, so they need not be asked.
UNARY_ID = "unary-"


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
            raise RuntimeError(f"{model}: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


class CancelWatch:
    """Asks live response senders whether their client has cancelled.

    Each question is a round trip to the server, so a round pauses in proportion to its length
    and asking never takes more than a small share of a core.
    """

    SHORTEST_PAUSE = 0.01  # seconds
    PAUSE_PER_SECOND_ASKED = 20.0

    def __init__(self) -> None:
        self._watched: dict[Any, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cancel-watch")
        self._thread.start()

    def add(self, sender: Any, on_cancel: Callable[[], None]) -> None:
        with self._changed:
            self._watched[sender] = on_cancel
            self._changed.notify()

    def discard(self, sender: Any) -> None:
        with self._changed:
            self._watched.pop(sender, None)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._watched)
                if self._closing:
                    return
                watched = list(self._watched.items())
            started = time.monotonic()
            for sender, on_cancel in watched:
                if sender.is_cancelled():
                    self.discard(sender)
                    on_cancel()
            asked = time.monotonic() - started
            time.sleep(max(self.SHORTEST_PAUSE, asked * self.PAUSE_PER_SECOND_ASKED))


class StreamModel:
    """`text_to_image_stream`: decoupled, every event of a request is a response of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        _log_to_stderr(args["model_name"])
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = _settings(args)
        config = PipelineConfig.load(folder / "pipeline.json")
        self._engine = Engine(
            TritonModels(),
            config,
            PromptTokenizer(folder, config),
            max_rows=int(settings["max_rows"]),
            buckets=[int(size) for size in settings["row_buckets"].split(",") if size.strip()],
            queue_size=int(settings["queue_size"]),
        )
        self._watch = CancelWatch()
        self._live: dict[str, Generation] = {}  # by request id, where the client gave one

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except InvalidArgument as error:
                _send_error(sender, EngineError("INVALID_ARG", str(error)))
            except EngineError as error:
                _send_error(sender, error)
            except Exception:
                log.exception("taking a request failed")
                _send_error(sender, EngineError("INTERNAL", "the server's log says why"))

    def finalize(self) -> None:
        self._engine.close()
        self._watch.close()

    def _start(self, request: Any, sender: Any) -> None:
        fields = _fields(request, (*FIELDS, "cancel"))
        if (target := fields.pop("cancel", None)) is not None:
            self._cancel(target, fields, sender)
            return
        parsed = GenerationRequest.parse(fields, self._engine.config)
        request_id = request.request_id()

        def forget() -> None:
            self._watch.discard(sender)
            self._live.pop(request_id, None)

        def reply(event: Event) -> None:
            if isinstance(event, End):
                forget()
            _send_event(sender, event)

        generation = self._engine.submit(parsed, reply)
        if request_id:
            self._live[request_id] = generation
        if not request_id.startswith(UNARY_ID):
            self._watch.add(sender, generation.cancel)
        if generation.ended:  # before it was known here
            forget()

    def _cancel(self, target: np.ndarray, others: dict[str, Any], sender: Any) -> None:
        name = target.reshape(-1)[0].decode("utf-8", "replace")
        if others:
            raise InvalidArgument("cancel", name, "it must be the only input of its request")
        generation = self._live.get(name)
        if generation is None:
            raise EngineError("NOT_FOUND", f"no live request has the id {name!r}")
        generation.cancel()
        _send(sender, {"event": b"cancelled"}, final=True)


class UnaryModel:
    """`text_to_image`: one response with all images, by way of `text_to_image_stream`."""

    def initialize(self, args: dict[str, str]) -> None:
        _log_to_stderr(args["model_name"])
        size = int(_settings(args)["queue_size"])
        self._waiting = ThreadPoolExecutor(size, "unary")
        self._places = threading.Semaphore(size)
        self._size = size
        self._watch = CancelWatch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            if not self._places.acquire(blocking=False):
                text = f"the queue is full ({self._size} requests): try again later"
                _send_error(sender, EngineError("UNAVAILABLE", text))
                continue
            fields = _fields(request, FIELDS)
            self._waiting.submit(self._serve, fields, sender)

    def finalize(self) -> None:
        self._waiting.shutdown()
        self._watch.close()

    def _serve(self, fields: dict[str, np.ndarray], sender: Any) -> None:
        request_id = UNARY_ID + uuid.uuid4().hex
        self._watch.add(sender, lambda: _ask_to_cancel(request_id))
        try:
            error, images = self._collect(fields, request_id)
            if error is not None:
                _respond(sender, pb_utils.InferenceResponse(error=error), final=True)
            else:
                _send(sender, _stacked(images), final=True)
        except Exception:
            log.exception("answering a request failed")
            _send_error(sender, EngineError("INTERNAL", "the server's log says why"))
        finally:
            self._watch.discard(sender)
            self._places.release()

    def _collect(self, fields: dict[str, np.ndarray], request_id: str):
        """The error of a request or its finished images by index, whichever comes."""
        fields["progress"] = np.array([False])
        request = pb_utils.InferenceRequest(
            model_name=STREAM,
            requested_output_names=["index", "image", "seed", "warning"],
            inputs=[pb_utils.Tensor(name, tensor) for name, tensor in fields.items()],
            request_id=request_id,
        )
        error, images = None, {}
        for response in request.exec(decoupled=True):
            if response.has_error():
                error = response.error()
            elif response.output_tensors():
                image = {t.name(): t.as_numpy()[0] for t in response.output_tensors()}
                images[int(image["index"])] = image
        return error, images


def _ask_to_cancel(request_id: str) -> None:
    target = np.array([request_id.encode()], object)
    request = pb_utils.InferenceRequest(
        model_name=STREAM,
        requested_output_names=["event"],
        inputs=[pb_utils.Tensor("cancel", target)],
    )
    for _ in request.exec(decoupled=True):  # it may have ended by itself: no matter
        pass


def _stacked(images: dict[int, dict[str, Any]]) -> dict[str, Any]:
    in_order = [images[index] for index in sorted(images)]
    return {
        "image": [image["image"] for image in in_order],
        "seed": [image["seed"] for image in in_order],
        "warning": in_order[0]["warning"],
    }


def _fields(request: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Copies of the inputs that a request brings: the server takes back its memory."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: t.as_numpy().copy() for name, t in tensors.items() if t is not None}


def _send_event(sender: Any, event: Event) -> None:
    match event:
        case Progress(index, step, total_steps, image):
            outputs = {"index": index, "step": step, "total_steps": total_steps}
            if image is None:
                _send(sender, {"event": b"progress", **outputs})
            else:
                _send(sender, {"event": b"preview", **outputs, "image": image})
        case Finished(index, seed, image, warnings):
            warning = "; ".join(warnings).encode()
            outputs = {"index": index, "seed": seed, "image": image, "warning": warning}
            _send(sender, {"event": b"image", **outputs})
        case End(None):
            _respond(sender, final=True)
        case End(error):
            _send_error(sender, error)


DTYPES = {"index": np.int32, "step": np.int32, "total_steps": np.int32, "seed": np.int64}


def _send(sender: Any, outputs: Mapping[str, Any], final: bool = False) -> None:
    tensors = [
        pb_utils.Tensor(name, np.array(value, DTYPES.get(name, object)).reshape(-1))
        for name, value in outputs.items()
    ]
    _respond(sender, pb_utils.InferenceResponse(tensors), final)


def _send_error(sender: Any, error: EngineError) -> None:
    failure = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
    _respond(sender, pb_utils.InferenceResponse(error=failure), final=True)


def _respond(sender: Any, response: Any = None, final: bool = False) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def _settings(args: dict[str, str]) -> dict[str, str]:
    parameters = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in parameters.items()}


def _log_to_stderr(name: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{name}: %(levelname)s %(message)s"
    )
