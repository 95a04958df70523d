"""One ONNX Runtime session whose inputs and outputs are bound, on the device that it runs on.

Inputs that never change stay on the device between runs. Knows nothing of diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort


class Network:
    """A session, and what it keeps on its device.

    Args:
        session: of one model; its outputs are read in host memory.
        device_id: of the GPU, or None for the CPU.
        outputs: names of those that are needed; none is all.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device_id: int | None = None,
        outputs: Sequence[str] = (),
    ):
        self._session = session
        self._device = ("cpu", 0) if device_id is None else ("cuda", device_id)
        self._outputs = list(outputs) or [node.name for node in session.get_outputs()]
        self._kept: dict[str, tuple[np.ndarray, ort.OrtValue]] = {}  # by input

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Models.run`; from any thread."""
        binding = self._session.io_binding()
        values = {name: self._value(name, tensor) for name, tensor in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _value(self, name: str, tensor: np.ndarray) -> ort.OrtValue:
        """The tensor on the device; the latest of each input that is not writeable stays there."""
        if tensor.flags.writeable:
            return self._on_device(tensor)
        kept, value = self._kept.get(name, (None, None))
        if value is None or kept is not tensor:
            value = self._on_device(tensor)
            self._kept[name] = tensor, value
        return value

    def _on_device(self, tensor: np.ndarray) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor), *self._device)
