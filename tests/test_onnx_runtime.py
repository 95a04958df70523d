"""Sessions follow config.pbtxt as the native backend does, in-process and in the server."""

from __future__ import annotations

import queue
import shutil

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpc

from twinbrush.runtimes import onnx_runtime
from twinbrush.runtimes.onnx_runtime import open_session, read_config


def config(**parameters):
    return {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}


@pytest.fixture(scope="module")
def model(repository):
    return repository / "fusion" / "1" / "model.onnx"


def test_threads_and_modes_are_read(model):
    asked = config(intra_op_thread_count="3", inter_op_thread_count="2", execution_mode="1",
                   enable_mem_arena="0", enable_mem_pattern="0")  # fmt: skip
    options = open_session(model, asked).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (-1, "ORT_ENABLE_BASIC"),
        (1, "ORT_ENABLE_ALL"),
        (2, "ORT_DISABLE_ALL"),
        (None, "ORT_ENABLE_ALL"),
    ],
)
def test_graph_levels_are_those_of_the_native_backend(model, level, expected):
    asked = {} if level is None else {"optimization": {"graph": {"level": level}}}
    options = open_session(model, asked).get_session_options()
    assert options.graph_optimization_level.name == expected


def test_session_entries_are_passed_on(model):
    asked = config(**{"session.intra_op.allow_spinning": "0"})
    options = open_session(model, asked).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def accelerators(side, name, **parameters):
    entry = {f"{side}_execution_accelerator": [{"name": name, "parameters": parameters}]}
    return {"optimization": {"execution_accelerators": entry}}


@pytest.mark.parametrize(
    ("asked", "word"),
    [(config(wings="2"), "'wings'"), (accelerators("cpu", "openvino"), "'openvino'"),
     ({"optimization": {"graph": {"level": 7}}}, "level 7")],
)  # fmt: skip
def test_what_cannot_be_honoured_is_logged_and_not_fatal(model, caplog, monkeypatch, asked, word):
    monkeypatch.setattr(onnx_runtime.openvino_runtime, "is_installed", lambda: False)
    assert open_session(model, asked).get_providers() == ["CPUExecutionProvider"]
    assert word in caplog.text


def test_a_gpu_instance_asks_for_cuda_with_its_settings(monkeypatch):
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    asked = config(cudnn_conv_algo_search="1", gpu_mem_limit="1000")
    assert onnx_runtime._providers(asked, device_id=1) == [
        ("CUDAExecutionProvider",
         {"cudnn_conv_algo_search": "HEURISTIC", "gpu_mem_limit": "1000", "device_id": "1"}),
        ("CPUExecutionProvider", {}),
    ]  # fmt: skip
    asked = accelerators("gpu", "tensorrt", trt_fp16_enable="1")
    names = [name for name, _ in onnx_runtime._providers(asked, device_id=0)]
    assert names == available


def test_without_cuda_a_gpu_instance_says_so_and_runs(model, caplog):
    assert open_session(model, {}, device_id=0).get_providers() == ["CPUExecutionProvider"]
    assert "'cuda'" in caplog.text


@pytest.mark.parametrize("content", [None, b"not a network"])
def test_a_file_that_cannot_be_loaded_is_named(tmp_path, content):
    file = tmp_path / "model.onnx"
    if content:
        file.write_bytes(content)
    with pytest.raises(RuntimeError, match=str(file)):
        open_session(file, {})


def test_the_backend_joins_the_requests_that_triton_batches(repository, start_server, tmp_path):
    """A model with max_batch_size: several requests, one run, each its own rows back."""
    folder = tmp_path / "repository" / "vqgan_decoder"
    shutil.copytree(repository / "vqgan_decoder", folder)
    text = (folder / "config.pbtxt").read_text().replace("dims: [ -1, ", "dims: [ ")
    text = text.replace("max_batch_size: 0", "max_batch_size: 8", 1)
    # Numbers tell more than their bytes.
    text += 'output { name: "image" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] }\n'
    text += (
        "dynamic_batching { max_queue_delay_microseconds: 200000 preferred_batch_size: [ 8 ] }\n"
    )
    (folder / "config.pbtxt").write_text(text)
    server = start_server(folder.parent, "--expose-networks")
    server.wait_for("ready in")
    client = grpc.InferenceServerClient(server.address)
    latents = [np.random.default_rng(i).standard_normal((1 + i % 2, 4, 8, 8), np.float32)
               for i in range(5)]  # fmt: skip
    calls = []
    for latent in latents:
        tensor = grpc.InferInput("latent", list(latent.shape), "FP32")
        tensor.set_data_from_numpy(latent)
        calls.append(later(client, tensor))
    session = open_session(folder / "1" / "model.onnx", read_config(folder / "config.pbtxt"))
    for latent, wait in zip(latents, calls, strict=True):
        (expected,) = session.run(["image"], {"latent": latent})
        np.testing.assert_allclose(wait(), expected, atol=1e-4)
    statistics = client.get_inference_statistics("vqgan_decoder").model_stats[0]
    assert statistics.inference_count == sum(len(latent) for latent in latents)
    assert statistics.execution_count < len(latents)
    server.stop()


def later(client, tensor):
    answer: queue.SimpleQueue = queue.SimpleQueue()
    client.async_infer("vqgan_decoder", [tensor], lambda result, error: answer.put((result, error)))

    def wait():
        result, error = answer.get(timeout=60)
        assert error is None, error
        return result.as_numpy("image")

    return wait
