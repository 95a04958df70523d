"""`Models` over the networks that the same server serves (business logic scripting)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from twinbrush import doors
from twinbrush.engine.generation import EngineError
from twinbrush.engine.threads import Fail

# Messages of a server that has been told to end while requests live.
SHUTDOWN = ("Server not ready", "Server is stopping")
UNHEALTHY = "is not healthy"  # of a Python backend's process


class TritonModels:
    """`Models` that are called inside the server.

    The latest of each input that is not writeable stays in shared memory: a tensor is copied there
    once, however many calls it is part of.

    Args:
        fail: called with a sentence when a model's process hangs or has died: the server never
            starts it again, so every later call would fail.
    """

    on_accelerator = False  # a call first goes to another process

    def __init__(self, fail: Fail):
        self._fail = fail
        self._kept: dict[tuple[str, str], tuple[np.ndarray, Any]] = {}  # by model and input

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Models.run`."""
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[],  # which asks for all
            inputs=[self._tensor(model, name, array) for name, array in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            parameters=doors.parameters(),
        )
        response = request.exec()
        if response.has_error():
            reason = response.error().message()
            if any(text in reason for text in SHUTDOWN):
                raise EngineError.of_shutdown()
            if UNHEALTHY in reason:
                self._fail(f"{model}: {reason}")
            raise RuntimeError(f"{model}: {reason}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def _tensor(self, model: str, name: str, array: np.ndarray) -> Any:
        if array.flags.writeable:
            return pb_utils.Tensor(name, np.ascontiguousarray(array))
        kept = self._kept.get((model, name))
        if kept is None or kept[0] is not array:
            kept = array, pb_utils.Tensor(name, np.ascontiguousarray(array))
            self._kept[model, name] = kept
        return kept[1]
