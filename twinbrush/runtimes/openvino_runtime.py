"""OpenVINO on the CPU behind the methods of an ONNX Runtime session. Knows nothing of diffusion.

OpenVINO reads the exported ONNX files as they are. In BF16 it would round also what goes into
sines and cosines, and the sine of a rounded 999 says nothing of 999: such nodes at the front of a
graph are cut off and run in FP32.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
PARAMETERS = {"precision", "num_of_threads"}
ONNX_TYPES = {"f32": "float", "f16": "float16", "i64": "int64", "i32": "int32", "u8": "uint8"}
WAVES = ("Sin", "Cos")
MAX_FRONT = 32  # nodes before a sine; more is no timestep


@dataclass(frozen=True)
class Argument:
    """An input or output.

    Attributes:
        name: of the tensor.
        shape: sizes; None where one varies.
        type: element type as ONNX Runtime writes it, such as "tensor(float)".
    """

    name: str
    shape: list[int | None]
    type: str

    @classmethod
    def of(cls, port: Any) -> Argument:
        """An argument of an OpenVINO port."""
        shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
        kind = port.get_element_type().get_type_name()
        return cls(port.get_any_name(), shape, f"tensor({ONNX_TYPES.get(kind, kind)})")


def is_installed() -> bool:
    """Whether the `openvino` package can be imported."""
    import importlib.util

    return importlib.util.find_spec("openvino") is not None


class OpenVinoSession:
    """One ONNX file; the methods are those of `onnxruntime.InferenceSession` that servers call.

    Args:
        model: the ONNX file.
        parameters: `precision` (fp32, fp16 or bf16; fp32 by default) and `num_of_threads`.
        threads: of the session where `num_of_threads` is not given.

    Raises:
        ValueError: a parameter is unknown, or its value is not allowed.
        RuntimeError: OpenVINO cannot load the file.
    """

    def __init__(self, model: Path, parameters: Mapping[str, str], threads: int):
        import openvino

        precision, threads = parse_parameters(parameters, threads)
        core = _core()
        whole = core.read_model(str(model))
        self._inputs = [Argument.of(port) for port in whole.inputs]
        self._outputs = [Argument.of(port) for port in whole.outputs]
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        front, body = _cut(openvino, whole)
        hint = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
        full = {"INFERENCE_PRECISION_HINT": "f32"}
        self._front = core.compile_model(front, "CPU", settings | full) if front else None
        self._body = core.compile_model(body, "CPU", settings | hint)
        self._requests = [m.create_infer_request() for m in (self._front, self._body) if m]
        self._lock = threading.Lock()  # a request runs once at a time

    def get_inputs(self) -> list[Argument]:
        """The inputs of the ONNX file, in its order."""
        return self._inputs

    def get_outputs(self) -> list[Argument]:
        """The outputs of the ONNX file, in its order."""
        return self._outputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs by name, in the order of `names`; None is all of them.

        Raises:
            Exception: OpenVINO failed.
        """
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in feed.items()}
        with self._lock:
            for request in self._requests:
                known = {name for port in request.model_inputs for name in port.names}
                request.infer({k: v for k, v in tensors.items() if k in known}, share_inputs=True)
                for port in request.model_outputs:
                    data = request.get_tensor(port).data
                    tensors |= dict.fromkeys(port.names, data)
            wanted = names or [argument.name for argument in self._outputs]
            return [tensors[name].copy() for name in wanted]


@functools.cache
def _core() -> Any:
    """OpenVINO's one core of this process, for good.

    A core gives its thread a stack for signals, and takes it away as it ends. Where cores end in
    the order in which they began, the thread is left with a stack that is gone, and the next
    signal ends the process.
    """
    import openvino

    return openvino.Core()


def parse_parameters(parameters: Mapping[str, str], threads: int) -> tuple[str, int]:
    """Precision and threads of the accelerator's parameters.

    Raises:
        ValueError: a parameter is unknown, or its value is not allowed.
    """
    for name in parameters.keys() - PARAMETERS:
        raise ValueError(
            f"{name} is no parameter of openvino: only {', '.join(sorted(PARAMETERS))}"
        )
    precision = parameters.get("precision", "fp32").lower()
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is invalid: must be {', '.join(PRECISIONS)}")
    given = parameters.get("num_of_threads", str(threads))
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"num_of_threads={given!r} is invalid: must be a whole number above 0")
    return precision, int(given)


def _cut(openvino: Any, model: Any) -> tuple[Any, Any]:
    """The sines and cosines at the front of a graph, or None, and what follows them."""
    from openvino import opset13

    waves = [node for node in model.get_ordered_ops() if node.get_type_name() in WAVES]
    waves = [node for node in waves if len(_before(node)) <= MAX_FRONT]
    if not waves:
        return None, model
    entries = []
    for number, wave in enumerate(waves):
        port, name = wave.output(0), f"wave_{number}"
        followers = list(port.get_target_inputs())
        entry = opset13.parameter(port.get_partial_shape(), port.get_element_type())
        entry.output(0).set_names({name})
        port.get_tensor().set_names({name})
        for follower in followers:
            follower.replace_source_output(entry.output(0))
        entries.append(entry)
    parameters = model.get_parameters()
    sources = {node.get_friendly_name() for wave in waves for node in _before(wave)}
    needed = [p for p in parameters if p.get_friendly_name() in sources]
    front = openvino.Model([opset13.result(wave.output(0)) for wave in waves], needed)
    left = [p for p in parameters if any(out.get_target_inputs() for out in p.outputs())]
    rest = [p for p in left if p not in needed or _feeds_body(p, waves)]
    return front, openvino.Model(model.get_results(), [*rest, *entries])


def _before(node: Any) -> list[Any]:
    """The nodes that a node depends on, itself included, until there are too many."""
    found, waiting = {}, [node]
    while waiting and len(found) <= MAX_FRONT:
        current = waiting.pop()
        if current.get_friendly_name() not in found:
            found[current.get_friendly_name()] = current
            waiting += [port.get_node() for port in current.input_values()]
    return list(found.values())


def _feeds_body(parameter: Any, waves: Sequence[Any]) -> bool:
    """Whether something besides the waves depends on a parameter."""
    front = {node.get_friendly_name() for wave in waves for node in _before(wave)}
    followers = [port.get_node() for port in parameter.output(0).get_target_inputs()]
    return any(node.get_friendly_name() not in front for node in followers)
