"""ONNX Runtime sessions as `config.pbtxt` asks for them, and `Models` over them in-process.

The keys are those that Triton's native ONNX Runtime backend reads, so one `config.pbtxt`
serves both. Knows nothing of diffusion.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from twinbrush.cpus import available_cpus
from twinbrush.runtimes import openvino_runtime
from twinbrush.runtimes.attention import with_blocks
from twinbrush.runtimes.bound import Network

log = logging.getLogger(__name__)

# `optimization.graph.level`: -1 basic, 1 (and silence) everything, 2 nothing.
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
ACCELERATORS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
# Keys that the native backend reads as parameters of the CUDA provider.
CUDA_KEYS = (
    "cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy",
    "do_copy_in_default_stream",
)  # fmt: skip
CUDA_ENUMS = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}


def open_session(
    model: Path, config: Mapping[str, Any], device_id: int | None = None
) -> ort.InferenceSession | openvino_runtime.OpenVinoSession:
    """A session for a model of a repository; OpenVINO's where the accelerator of the CPU is that.

    Args:
        model: the ONNX file.
        config: the model's configuration, in Triton's JSON form.
        device_id: of the GPU that the instance is placed on, or None for the CPU.

    What the configuration asks for and this build of ONNX Runtime has not is logged.

    Raises:
        RuntimeError: the file is missing or ONNX Runtime cannot load it.
    """
    if not model.is_file():
        raise RuntimeError(f"{model} is not there: run `python -m export CHECKPOINT`")
    if device_id is None and (parameters := _openvino(config)) is not None:
        try:
            return openvino_runtime.OpenVinoSession(model, parameters, available_cpus())
        except Exception as error:
            raise RuntimeError(f"OpenVINO cannot load {model}: {error}") from error
    options = _session_options(config)
    providers = _providers(config, device_id)
    try:
        source = with_blocks(model) if len(providers) == 1 else None  # the CPU alone
        if source is not None:
            options.add_session_config_entry(EXTERNAL_DATA, str(model.parent))
        return ort.InferenceSession(source or str(model), options, providers=providers)
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime cannot load {model}: {error}") from error


def _openvino(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Parameters of the CPU's accelerator where it is `openvino`, and that package is there."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for entry in accelerators.get("cpu_execution_accelerator", []):
        if entry["name"] == "openvino" and openvino_runtime.is_installed():
            return dict(entry.get("parameters", {}))
    return None


def _session_options(config: Mapping[str, Any]) -> ort.SessionOptions:
    parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        log.warning("optimization.graph.level %s is unknown and ignored", level)
        level = 0
    options.graph_optimization_level = GRAPH_LEVELS[level]
    for key, value in parameters.items():
        if key == "intra_op_thread_count":
            options.intra_op_num_threads = int(value)
        elif key == "inter_op_thread_count":
            options.inter_op_num_threads = int(value)
        elif key == "execution_mode":
            parallel = int(value) == 1
            options.execution_mode = (
                ort.ExecutionMode.ORT_PARALLEL if parallel else ort.ExecutionMode.ORT_SEQUENTIAL
            )
        elif key == "enable_mem_arena":
            options.enable_cpu_mem_arena = int(value) == 1
        elif key == "enable_mem_pattern":
            options.enable_mem_pattern = int(value) == 1
        elif key.startswith("session."):
            options.add_session_config_entry(key, value)
        elif key not in CUDA_KEYS:
            log.warning("parameter %r is not known here and is ignored", key)
    options.intra_op_num_threads = options.intra_op_num_threads or _threads()
    return options


def _threads() -> int:
    """Threads of a session; 0, which is ONNX Runtime's own choice, knows no quota of CPUs."""
    cpus = available_cpus()
    return cpus if cpus < (os.cpu_count() or 1) else 0


def _providers(config: Mapping[str, Any], device_id: int | None) -> list[tuple[str, dict]]:
    """Execution providers in order of preference, the CPU last."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    side = "cpu" if device_id is None else "gpu"
    wanted = {
        entry["name"]: dict(entry.get("parameters", {}))
        for entry in accelerators.get(f"{side}_execution_accelerator", [])
    }
    if device_id is not None:
        wanted.setdefault("cuda", {})
        for key in CUDA_KEYS:
            if value := config.get("parameters", {}).get(key, {}).get("string_value"):
                names = CUDA_ENUMS.get(key)
                wanted["cuda"][key] = names[int(value)] if names else value
    providers = []
    for name, settings in wanted.items():
        provider = ACCELERATORS.get(name)
        if provider not in ort.get_available_providers():
            log.warning("accelerator %r is not in this build of ONNX Runtime: ignored", name)
            continue
        if device_id is not None:
            settings["device_id"] = str(device_id)
        providers.append((provider, settings))
    return [*providers, ("CPUExecutionProvider", {})]


class LocalModels:
    """`Models` that run in this process: the server's speed limit, and the tests' double.

    Needs tritonclient, whose protobuf definitions read `config.pbtxt`.

    Args:
        repository: model repository.
        files: ONNX files by model, to run in place of the repository's.
        on_gpu: whether models run on the GPU of their `instance_group` where ONNX Runtime has
            CUDA, as Triton would place them.
        configs: files by model, to read in place of the repository's `config.pbtxt`.

    Raises:
        RuntimeError: a network cannot be loaded.
    """

    def __init__(
        self,
        repository: Path,
        files: Mapping[str, Path] | None = None,
        on_gpu: bool = False,
        configs: Mapping[str, Path] | None = None,
    ):
        self._networks: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]] = {}
        self._devices: set[int | None] = set()
        for path in sorted(repository.glob("*/config.pbtxt")):
            model = (files or {}).get(path.parent.name, path.parent / "1" / "model.onnx")
            if model.exists():
                config = read_config((configs or {}).get(path.parent.name, path))
                device_id = _gpu_of(config) if on_gpu else None
                session = open_session(model, config, device_id)
                outputs = [output["name"] for output in config.get("output", [])]
                self._networks[path.parent.name] = _runner(session, device_id, outputs)
                self._devices.add(device_id)

    @property
    def on_accelerator(self) -> bool:
        """Whether all of them run on one GPU."""
        return len(self._devices) == 1 and None not in self._devices

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Models.run`."""
        return self._networks[model](inputs)


def _runner(
    session: ort.InferenceSession | openvino_runtime.OpenVinoSession,
    device_id: int | None,
    names: Sequence[str],
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """The function of a session from inputs to the named outputs, by name; no names are all."""
    if isinstance(session, ort.InferenceSession):
        return Network(session, device_id, names).run
    names = names or [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _gpu_of(config: Mapping[str, Any]) -> int | None:
    """The GPU that Triton would place a model on: `KIND_AUTO` is a GPU where there is one."""
    if ACCELERATORS["cuda"] not in ort.get_available_providers():
        return None
    (group, *_) = config.get("instance_group") or [{}]
    if group.get("kind", "KIND_AUTO") == "KIND_CPU":
        return None
    return int((group.get("gpus") or [0])[0])


def read_config(path: Path) -> dict[str, Any]:
    """A `config.pbtxt` in Triton's JSON form."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    empty = model_config_pb2.ModelConfig()  # pyright: ignore[reportAttributeAccessIssue]
    message = text_format.Parse(path.read_text(), empty)
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
