"""Where the networks run: the choice, what it makes Triton load, and that pictures are equal."""

from __future__ import annotations

import os
import shutil
import signal
import time

import numpy as np
import pytest
from test_server import STUB, processes

from twinbrush.runtime_choice import Runtime, chosen_runtime, configured_runtime
from twinbrush.runtimes.bound import Network
from twinbrush.runtimes.onnx_runtime import _gpu_of, open_session, read_config
from twinbrush.server.checks import check_runtime
from twinbrush.server.errors import ServerError
from twinbrush_client import Client


def config(runtime: str) -> dict:
    return {"parameters": {"runtime": {"string_value": runtime}}}


# The choice ----------------------------------------------------------------------------------


def test_the_launchers_choice_goes_before_the_parameter():
    assert chosen_runtime({}, {}) == Runtime.SERVED
    assert chosen_runtime(config("in_process"), {}) == Runtime.IN_PROCESS
    asked = {"TWINBRUSH_RUNTIME": "served"}
    assert chosen_runtime(config("in_process"), asked) == Runtime.SERVED


def test_an_unknown_runtime_is_named_with_what_is_allowed(repository, tmp_path):
    with pytest.raises(ValueError, match=r"runtime='gpu' .* must be served or in_process"):
        configured_runtime(config("gpu"))
    folder = tmp_path / "text_to_image_stream"
    shutil.copytree(repository / folder.name, folder)
    text = (folder / "config.pbtxt").read_text()
    assert '"runtime" value: { string_value: "served" }' in text
    file = folder / "config.pbtxt"
    file.write_text(text.replace('string_value: "served"', 'string_value: "gpu"'))
    with pytest.raises(ServerError, match=r"config.pbtxt: runtime='gpu'"):
        check_runtime(tmp_path, None, None, False)
    file.write_text(text.replace('string_value: "served"', 'string_value: "in_process"'))
    assert check_runtime(tmp_path, None, None, False) == Runtime.IN_PROCESS
    assert check_runtime(tmp_path, None, Runtime.SERVED, True) == Runtime.SERVED


@pytest.mark.parametrize(
    ("options", "name"), [(("tensorrt", False), "--config-name"), ((None, True), "--expose-net")]
)
def test_options_of_served_networks_are_refused_in_process(repository, options, name):
    config_name, expose = options
    with pytest.raises(ServerError, match=name):
        check_runtime(repository, config_name, Runtime.IN_PROCESS, expose)


# The real server -----------------------------------------------------------------------------


def paint(address: str) -> list[bytes]:
    """Pixels and files of deterministic requests, through both front doors."""
    fields = {"deterministic": True, "sampler": "euler_a"}
    painted = []
    with Client(address) as client:
        for seed, steps in ((1, 2), (2, 5)):
            pictures = client.generate(
                "a red ring", negative_prompt="a star", guidance_scale=3.0, num_images=2,
                seed=seed, steps=steps, **fields,
            )  # fmt: skip
            painted += [picture.tobytes() for picture in pictures]
        events = list(client.stream("a blue star", seed=3, steps=3, **fields))
        assert [type(event).__name__ for event in events] == ["Progress"] * 3 + ["Picture"]
        painted.append(events[-1].data)
    return painted


def test_in_process_paints_the_same_bytes_loads_the_doors_alone_and_ends_with_its_stub(
    repository, server, start_server
):
    other = start_server(repository, "--runtime", "in_process")
    other.wait_for("ready in")
    assert paint(other.address) == paint(server.address)
    stubs = {pid: line for pid, line in processes(other.process.pid).items() if STUB in line}
    assert len(stubs) == 2
    (engine,) = [pid for pid, line in stubs.items() if "text_to_image_stream_0" in line]
    os.kill(engine, signal.SIGKILL)
    until = time.monotonic() + 30
    while other.process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "the Python stub of text_to_image_stream ended with signal 9" in other.text()


# The session ---------------------------------------------------------------------------------


class Placed(Network):
    """Counts what is placed on the device."""

    def __init__(self, *args):
        super().__init__(*args)
        self.placed: list[np.ndarray] = []

    def _on_device(self, tensor):
        self.placed.append(tensor)
        return super()._on_device(tensor)


def test_what_never_changes_is_placed_once_and_the_rest_each_time(repository):
    folder = repository / "vqgan_decoder"
    session = open_session(folder / "1" / "model.onnx", read_config(folder / "config.pbtxt"))
    network = Placed(session)
    first, second = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8), np.float32)
    expected = [session.run(["image"], {"latent": latent})[0] for latent in (first, second)]
    frozen = [first.copy(), second.copy()]
    for tensor in frozen:
        tensor.setflags(write=False)
    for latent, wanted, placed in (
        (first, 0, 1), (first, 0, 2), (frozen[0], 0, 3), (frozen[0], 0, 3),
        (frozen[1], 1, 4), (second, 1, 5), (frozen[1], 1, 5), (frozen[0], 0, 6),
    ):  # fmt: skip
        outputs = network.run({"latent": latent})
        np.testing.assert_array_equal(outputs["image"], expected[wanted])
        assert len(network.placed) == placed


@pytest.mark.parametrize(
    ("group", "gpu"),
    [({"kind": "KIND_AUTO"}, 0), ({"kind": "KIND_GPU", "gpus": [2]}, 2),
     ({"kind": "KIND_CPU"}, None)],
)  # fmt: skip
def test_a_network_takes_the_gpu_of_its_instance_group(monkeypatch, group, gpu):
    import onnxruntime as ort

    assert _gpu_of({"instance_group": [group]}) is None
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    assert _gpu_of({"instance_group": [group]}) == gpu
