"""Triton's `onnxruntime` backend in Python, for servers that lack the native one.

Reads the same `config.pbtxt`. Needs `twinbrush` and `onnxruntime` in the interpreter that
runs Triton's Python stubs.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from twinbrush import doors
from twinbrush.orphans import end_with_server
from twinbrush.runtimes.onnx_runtime import open_session


class TritonPythonModel:
    """Serves one ONNX file."""

    def initialize(self, args):
        end_with_server()
        logging.basicConfig(stream=sys.stderr, format=f"{args['model_name']}: %(message)s")
        config = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        name = config.get("default_model_filename") or "model.onnx"
        file = Path(args["model_repository"]) / args["model_version"] / name
        device = int(args["model_instance_device_id"]) if on_gpu else None
        self.session = open_session(file, config, device)
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [output["name"] for output in config["output"]]
        self.batching = int(config.get("max_batch_size", 0)) > 0

    def execute(self, requests):
        """Answers all requests with one run where Triton has batched them.

        Refuses those of clients, see `twinbrush.doors`.
        """
        allowed = [_is_open(request) for request in requests]
        if all(allowed):
            return self._run(requests)
        answers = iter(self._run([r for r, ok in zip(requests, allowed, strict=True) if ok]))
        return [next(answers) if ok else _refusal() for ok in allowed]

    def _run(self, requests):
        if not requests:
            return []
        feeds = [
            {name: pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs}
            for r in requests
        ]
        if not self.batching or len(requests) == 1:
            return [self._answer(r, feed) for r, feed in zip(requests, feeds, strict=True)]
        rows = np.cumsum([len(feed[self.inputs[0]]) for feed in feeds])[:-1]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        try:
            results = self.session.run(self.outputs, joined)
        except Exception as error:
            return [_failure(error) for _ in requests]
        parts = zip(*(np.split(result, rows) for result in results), strict=True)
        return [self._response(r, part) for r, part in zip(requests, parts, strict=True)]

    def _answer(self, request, feed):
        try:
            return self._response(request, self.session.run(self.outputs, feed))
        except Exception as error:
            return _failure(error)

    def _response(self, request, results):
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, result)
                for name, result in zip(self.outputs, results, strict=True)
                if name in wanted
            ]
        )


def _is_open(request):
    try:
        return doors.is_open(request.parameters())
    except ValueError:  # of a client's: parameters that are no UTF-8
        return False


def _failure(error):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"ONNX Runtime: {error}"))


def _refusal():
    error = pb_utils.TritonError(doors.REFUSAL, pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(error=error)
