"""Triton's side of both front doors: tensors in, events out, calls to the served networks.

The only file of this package that names `pb_utils`. Knows nothing of diffusion.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush.cancel_watch import CancelWatch
from twinbrush.config import PipelineConfig
from twinbrush.engine import Engine
from twinbrush.generation import End, EngineError, Event, Finished, Generation, Progress
from twinbrush.prompt import PromptTokenizer
from twinbrush.request import FIELDS, GenerationRequest, InvalidArgument

log = logging.getLogger(__name__)
STREAM = "text_to_image_stream"
# Request ids of what the unary front door hands on. Its cancels come by id, since the sender of
# such a request never tells of one, and its errors carry their code in the message, since
# calls inside the server lose it.
RELAYED_ID = "relayed-"
CODE_END = "|"
# Held around calls that make, answer, ask about or free a request. Triton 24.10's Python stub
# is not safe there from several threads: it crashes within a few hundred requests when one
# asks for a cancel while another frees the responses of a call inside the server.
STUB_LOCK = threading.Lock()
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
            raise RuntimeError(f"{model}: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


class Answer:
    """How one request is answered, by responses and exactly one end."""

    def __init__(self, request: Any):
        self.relayed = request.request_id().startswith(RELAYED_ID)
        self._sender = request.get_response_sender()
        self._open = True
        self._lock = threading.Lock()

    def send(self, outputs: Mapping[str, Any], final: bool = False) -> None:
        tensors = [
            pb_utils.Tensor(name, np.array(value, DTYPES.get(name, object)).reshape(-1))
            for name, value in outputs.items()
        ]
        self._respond(pb_utils.InferenceResponse(tensors), final)

    def fail(self, error: EngineError) -> None:
        text = f"{error.code}{CODE_END}{error}" if self.relayed else str(error)
        failure = pb_utils.TritonError(text, getattr(pb_utils.TritonError, error.code))
        self._respond(pb_utils.InferenceResponse(error=failure), final=True)

    def end(self) -> None:
        self._respond(None, final=True)

    def cancelled(self) -> bool:
        """Whether the client has cancelled; False once answered.

        The server dies of the question when it comes after the end, hence the lock.
        """
        with self._lock, STUB_LOCK:
            return self._open and self._sender.is_cancelled()

    def _respond(self, response: Any, final: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        with self._lock, STUB_LOCK:
            self._open = not final
            self._sender.send(response, flags=flags)


class StreamModel:
    """`text_to_image_stream`: decoupled, every event of a request is a response of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        _prepare_process(args["model_name"])
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
            answer = Answer(request)
            try:
                self._start(request, answer)
            except InvalidArgument as error:
                answer.fail(EngineError("INVALID_ARG", str(error)))
            except EngineError as error:
                answer.fail(error)
            except Exception:
                log.exception("taking a request failed")
                answer.fail(EngineError("INTERNAL", "the server's log says why"))

    def finalize(self) -> None:
        self._engine.close()
        self._watch.close()

    def _start(self, request: Any, answer: Answer) -> None:
        fields = _fields(request, (*FIELDS, "cancel"))
        if (target := fields.pop("cancel", None)) is not None:
            self._cancel(target, fields, answer)
            return
        parsed = GenerationRequest.parse(fields, self._engine.config)
        request_id = request.request_id()

        def forget() -> None:
            self._watch.discard(answer)
            self._live.pop(request_id, None)

        def reply(event: Event) -> None:
            if isinstance(event, End):
                forget()
            _tell(answer, event)

        generation = self._engine.submit(parsed, reply)
        if request_id:
            self._live[request_id] = generation
        if not answer.relayed:
            self._watch.add(answer, generation.cancel)
        if generation.ended:  # before it was known here
            forget()

    def _cancel(self, target: np.ndarray, others: dict[str, Any], answer: Answer) -> None:
        name = target.reshape(-1)[0].decode("utf-8", "replace")
        if others:
            raise InvalidArgument("cancel", name, "it must be the only input of its request")
        generation = self._live.get(name)
        if generation is None:
            raise EngineError("NOT_FOUND", f"no live request has the id {name!r}")
        generation.cancel()
        answer.send({"event": b"cancelled"}, final=True)


class UnaryModel:
    """`text_to_image`: one response with all images, by way of `text_to_image_stream`."""

    def initialize(self, args: dict[str, str]) -> None:
        _prepare_process(args["model_name"])
        size = int(_settings(args)["queue_size"])
        self._waiting = ThreadPoolExecutor(size, "unary")
        self._places = threading.Semaphore(size)
        self._size = size
        self._watch = CancelWatch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = Answer(request)
            try:
                fields = _fields(request, FIELDS)
            except InvalidArgument as error:
                answer.fail(EngineError("INVALID_ARG", str(error)))
                continue
            if self._places.acquire(blocking=False):
                self._waiting.submit(self._serve, fields, answer)
            else:
                text = f"the queue is full ({self._size} requests): try again later"
                answer.fail(EngineError("UNAVAILABLE", text))

    def finalize(self) -> None:
        self._waiting.shutdown()
        self._watch.close()

    def _serve(self, fields: dict[str, np.ndarray], answer: Answer) -> None:
        request_id = RELAYED_ID + uuid.uuid4().hex
        self._watch.add(answer, lambda: _ask_to_cancel(request_id))
        try:
            answer.send(_stacked(_collect(fields, request_id)), final=True)
        except EngineError as error:
            answer.fail(error)
        except Exception:
            log.exception("answering a request failed")
            answer.fail(EngineError("INTERNAL", "the server's log says why"))
        finally:
            self._watch.discard(answer)
            self._places.release()


def _collect(fields: dict[str, np.ndarray], request_id: str) -> dict[int, dict[str, Any]]:
    """The finished images of a request, by index.

    Raises:
        EngineError: the request ended without them.
    """
    fields["progress"] = np.array([False])
    request = pb_utils.InferenceRequest(
        model_name=STREAM,
        requested_output_names=["index", "image", "seed", "warning"],
        inputs=[pb_utils.Tensor(name, tensor) for name, tensor in fields.items()],
        request_id=request_id,
    )
    error, images = None, {}
    with STUB_LOCK:
        responses = request.exec(decoupled=True)
    for response in responses:  # to the end: the server owes the final flag
        if response.has_error():
            code, _, message = response.error().message().partition(CODE_END)
            error = EngineError(code, message) if message else EngineError("INTERNAL", code)
        elif response.output_tensors():
            image = {t.name(): t.as_numpy()[0] for t in response.output_tensors()}
            images[int(image["index"])] = image
    with STUB_LOCK:
        del responses, response, request
    if error is not None:
        raise error
    return images


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
    """Copies of the inputs that a request brings: the server takes back its memory.

    Raises:
        InvalidArgument: a JSON body had a member that is no input; the server makes such
            members parameters of the request.
    """
    for name, value in json.loads(request.parameters() or "{}").items():
        if not name.startswith("triton_"):
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


def _settings(args: dict[str, str]) -> dict[str, str]:
    parameters = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in parameters.items()}


def _prepare_process(name: str) -> None:
    """Sends the log to the server's, and keeps numpy's object dtype alive.

    Under load the Python stub of Triton 24.10 was seen to give back more references of that
    dtype than it took, until numpy reported that it would be freed, and crashed.
    """
    ctypes.c_ssize_t.from_address(id(np.dtype(object))).value += 1 << 40
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{name}: %(levelname)s %(message)s"
    )
