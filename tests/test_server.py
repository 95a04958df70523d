"""The launcher: start, serve, watch, stop without leftovers. The server is the real one."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc as grpc
from harness import ROOT, START_SECONDS, free_ports
from tritonclient.utils import InferenceServerException

from twinbrush.server import __main__ as launcher
from twinbrush.server import manifest
from twinbrush.server.errors import ServerError
from twinbrush.server.manifest import ManifestError, verify
from twinbrush.server.process import ServerOptions, TritonProcess

STUB = "triton_python_backend_stub"


def processes(parent: int) -> dict[int, str]:
    """Every descendant of a process: its id and command line."""
    found, wanted = {}, {parent}
    for _ in range(3):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:
                continue
            if int(stat[1]) in wanted:
                found[int(folder.name)] = command
        wanted = {parent, *found}
    return found


def leftovers(server) -> set[Path]:
    """What this server, not one of other tests, may leave: shared memory and a folder."""
    segments = Path("/dev/shm").glob(f"*twinbrush_ns*_{server.process.pid}_*")
    return {*segments, *Path(tempfile.gettempdir()).glob(f"twinbrush-ns*-{server.process.pid}-*")}


def assert_gone(server, family: dict[int, str]) -> None:
    assert server.process.poll() is not None
    assert not [command for pid, command in family.items() if alive(pid)]
    assert not leftovers(server)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for init to collect it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ask(server, **fields):
    client = grpc.InferenceServerClient(server.address)
    inputs = []
    for name, value in {"prompt": "a red circle", **fields}.items():
        text = isinstance(value, str)
        tensor = grpc.InferInput(name, [1], "BYTES" if text else "INT32")
        array = np.array([value.encode()], object) if text else np.array([value], np.int32)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return client.infer("text_to_image", inputs, client_timeout=60)


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGINT, signal.SIGTERM]]
)
def test_it_starts_serves_and_stops_without_leftovers(repository, start_server, signals):
    server = start_server(repository)
    server.wait_for("ready in")
    assert server.address in server.text()
    assert "nvidia-pytriton" in server.text() or "/opt/tritonserver" in server.text()
    family = processes(server.process.pid)
    assert len(leftovers(server)) > 7
    assert sum(STUB in command for command in family.values()) == 7
    assert len(ask(server).as_numpy("image")) == 1
    for number in signals:
        server.process.send_signal(number)
        time.sleep(0.3)  # the launcher is cleaning up when the next one comes
    assert server.process.wait(20) == 0
    assert "stopped" in server.text()
    assert_gone(server, family)


def test_it_ends_with_its_launcher_even_when_that_is_killed(repository, start_server):
    server = start_server(repository)
    server.wait_for("ready in")
    family = processes(server.process.pid)
    server.process.kill()
    until = time.monotonic() + 30
    while any(alive(pid) for pid in family):
        assert time.monotonic() < until, "the server outlived its launcher"
        time.sleep(0.1)


def test_a_request_that_a_stop_ends_gets_unavailable_so_that_clients_try_another_server(
    repository, start_server
):
    server = start_server(repository, "--drain-seconds", "0")
    server.wait_for("ready in")
    codes = []

    def wait_for_many():
        try:
            ask(server, steps=50, num_images=16, width=128, height=128)
        except InferenceServerException as error:
            codes.append((error.status(), error.message()))

    waiting = threading.Thread(target=wait_for_many)
    waiting.start()
    time.sleep(0.5)
    assert server.stop() == 0
    waiting.join(5)
    ((status, message),) = codes
    assert status == "StatusCode.UNAVAILABLE"
    assert message.startswith("the server is shutting down (request id ")
    assert "Traceback" not in server.text()


class Ends(Exception):
    """Of a test's server."""


@pytest.mark.parametrize("deaths", [1, 5])
def test_deaths_leave_a_start_that_gives_up_its_other_tries(monkeypatch, repository, deaths):
    died = ServerError("a stub died", worth_another_try=True)
    gave_up = ServerError("a stub gave up", worth_another_try=False, passing=True)
    ends = iter([*[died] * deaths, *[gave_up] * (launcher.STARTS - 1), Ends()])

    def serve(*_):
        raise next(ends)

    monkeypatch.setattr(launcher, "serve", serve)
    monkeypatch.setattr(launcher, "Signals", lambda _: SimpleNamespace(wait=lambda _: None))
    with pytest.raises(Ends):
        launcher.main(
            repository, http_port=0, grpc_port=0, metrics_port=0, restart=True, no_verify=True
        )


@pytest.mark.parametrize(("code", "passing"), [(-signal.SIGABRT, True), (1, False)])
def test_a_server_that_crashes_as_it_loads_is_tried_again(repository, code, passing):
    process = TritonProcess(None, ServerOptions(repository))
    process._process = SimpleNamespace(poll=lambda: code, pid=0)
    process._stubs = SimpleNamespace(dead=lambda started: None)
    process._reader = SimpleNamespace(join=lambda timeout: None)
    with pytest.raises(ServerError, match="ended while it loaded") as raised:
        process.check()
    assert raised.value.passing is passing


def test_a_log_that_nobody_can_be_shown_is_read_on(monkeypatch, repository):
    process = TritonProcess(None, ServerOptions(repository, verbose=True))
    process._process = SimpleNamespace(stdout=[b"first\n", b"second\n"])
    with open(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        process._read_log()
        monkeypatch.undo()
    assert list(process._output.lines) == ["first", "second"]


def test_a_start_that_takes_too_long_is_ended(repository, start_server):
    server = start_server(repository, "--ready-timeout", "1")
    assert server.process.wait(30) == 1
    assert "not ready after 1 s" in server.text()


def victim_of(server, model: str) -> int:
    family = processes(server.process.pid)
    return next(pid for pid, line in family.items() if STUB in line and f" {model}_0_0" in line)


@pytest.mark.parametrize("model", ["unet", "text_to_image_stream"])
def test_a_dead_stub_ends_the_server_at_once_and_waiting_clients_get_an_error(
    repository, start_server, model
):
    server = start_server(repository)
    server.wait_for("ready in")
    family = processes(server.process.pid)
    answers = []

    def wait_for_many():
        try:
            answers.append(ask(server, steps=50, num_images=16))
        except InferenceServerException as error:
            answers.append(error)

    waiting = threading.Thread(target=wait_for_many)
    waiting.start()
    time.sleep(0.3)
    killed = time.monotonic()
    os.kill(victim_of(server, model), signal.SIGKILL)
    assert server.process.wait(10) == 1
    assert time.monotonic() - killed < 4
    waiting.join(5)
    assert isinstance(answers[0], InferenceServerException)
    assert f"the Python stub of {model} ended with signal 9 (Killed)" in server.text()
    assert_gone(server, family)


def test_with_restart_it_serves_again_after_a_stub_died(repository, start_server):
    server = start_server(repository, "--restart")
    server.wait_for("ready in")
    os.kill(victim_of(server, "unet"), signal.SIGKILL)
    server.wait_for("starting again", 10)
    until = time.monotonic() + 60
    while server.text().count("ready in") < 2:
        assert time.monotonic() < until, server.text()
        time.sleep(0.1)
    assert len(ask(server).as_numpy("image")) == 1
    assert server.stop() == 0


@pytest.fixture
def copy(repository, tmp_path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "copy"))


def test_a_corrupt_onnx_file_is_named_with_its_reason(copy, start_server):
    (copy / "unet" / "1" / "model.onnx").write_bytes(b"not a network")
    server = start_server(copy, "--restart", "--no-verify")
    assert server.process.wait(60) == 1, "a model that cannot load is no reason to start again"
    assert "unet cannot be loaded" in server.text()
    assert "model.onnx" in server.text()
    assert "Traceback" not in server.text()
    assert not leftovers(server)


def test_a_config_that_cannot_be_read_is_named_with_its_mistake(copy, start_server):
    config = copy / "unet" / "config.pbtxt"
    config.write_text(config.read_text().replace("name:", "nam:", 1))
    server = start_server(copy)
    assert server.process.wait(60) == 1
    assert "unet cannot be loaded: failed to read text proto" in server.text()
    assert f"{config} (Error parsing text-format inference.ModelConfig: 2:4: " in server.text()
    assert 'has no field named "nam"' in server.text()


def test_a_file_that_was_not_exported_is_named_before_anything_starts(copy, start_server):
    file = copy / "fusion" / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    server = start_server(copy)
    assert server.process.wait(60) == 1
    assert f"{file} is not the file that was exported" in server.text()
    assert "--no-verify" in server.text()
    file.unlink()
    server = start_server(copy)
    assert server.process.wait(60) == 1
    assert server.text() == f"twinbrush: {file} is missing: export again\n"


@pytest.mark.parametrize("name", ["pipeline.json", "clip_tokenizer.json", "bert_tokenizer.json"])
def test_a_file_of_the_engine_that_was_not_exported_is_named(copy, name):
    verify(copy)
    file = copy / "text_to_image_stream" / "1" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(ManifestError, match=f"{file} is not the file that was exported"):
        verify(copy)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"models": [{"model": "unet"}]}'])
def test_a_manifest_that_cannot_be_read_is_named(copy, text):
    (copy / "MANIFEST.json").write_text(text)
    with pytest.raises(ManifestError, match=r"MANIFEST\.json cannot be read"):
        verify(copy)


def test_a_file_that_cannot_be_read_is_named(copy, monkeypatch):
    file = copy / "unet" / "1" / "model.onnx"

    def sha256_of(path):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return known(path)

    known = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    with pytest.raises(ManifestError, match=f"{file} cannot be read: Permission denied; the serv"):
        verify(copy)


def test_a_missing_export_is_named_with_what_to_run(copy, start_server):
    (copy / "text_to_image_stream" / "1" / "pipeline.json").unlink()
    server = start_server(copy, "--no-verify")
    assert server.process.wait(60) == 1
    assert "pipeline.json is not there: run `python -m export CHECKPOINT`" in server.text()


def test_a_stub_that_cannot_start_is_noticed(repository, start_server, tmp_path):
    """With a library missing the stub ends before it says a word, and Triton would wait."""
    import pytriton

    fake = tmp_path / "site" / "pytriton"
    shutil.copytree(Path(pytriton.__file__).parent / "tritonserver", fake / "tritonserver")
    (fake / "__init__.py").touch()
    libs = Path(pytriton.__file__).parent.parent / "nvidia_pytriton.libs"
    shutil.copytree(libs, tmp_path / "site" / "nvidia_pytriton.libs")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = fake / "tritonserver" / "python_backend_stubs" / version / STUB
    stub.write_bytes(stub.read_bytes().replace(b"libcudart-", b"libcudarX-"))
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    started = time.monotonic()
    server = start_server(repository, env=env)
    assert server.process.wait(30) == 1
    assert time.monotonic() - started < 15
    assert "the Python stub of " in server.text()
    assert " ended with exit code 127" in server.text()
    assert any(model in server.text().splitlines()[1] for model in ("fusion", "unet", "bert"))
    assert "cannot open shared object file" in server.text()


def test_a_port_in_use_is_named_with_its_flag(repository, start_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "twinbrush.server", "--repository", str(repository)]
        done = subprocess.run([*command, "--grpc-port", str(port)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1" in done.stderr
    assert "--grpc-port" in done.stderr


def test_one_port_for_two_endpoints_is_refused(repository):
    command = [sys.executable, "-m", "twinbrush.server", "--repository", str(repository)]
    port = str(free_ports(1)[0])
    done = subprocess.run(
        [*command, "--http-port", port, "--grpc-port", port], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"--http-port and --grpc-port are both {port}" in done.stderr


def test_an_empty_repository_is_named(tmp_path):
    command = [sys.executable, "-m", "twinbrush.server", "--repository", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path} holds no models" in done.stderr


def test_the_config_name_reaches_the_server(copy, start_server):
    configs = copy / "unet" / "configs"
    configs.mkdir()
    text = (copy / "unet" / "config.pbtxt").read_text()
    (configs / "other.pbtxt").write_text(text.replace('"onnxruntime"', '"nonesuch"'))
    server = start_server(copy, "--config-name", "other")
    assert server.process.wait(60) == 1
    assert "nonesuch" in server.text()


def test_a_command_runs_while_the_server_lives_and_gives_the_exit_code(repository, tmp_path):
    """Also behind a proxy, which must not be asked for what is on this machine."""
    command = [sys.executable, "-m", "twinbrush.server", "--repository", str(repository)]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    client = Path(sys.executable).parent / "twinbrush"
    then = f"{client} generate 'a red circle' --seed 3 --out {tmp_path}; exit 7"
    env = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run([*command, *ports, "--then", then], env=env, timeout=60)
    assert done.returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-circle-3.png"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_all_that_the_command_has_started(repository, start_server, tmp_path, number):
    told = tmp_path / "pid"
    server = start_server(repository, "--then", f"sleep 300 & echo $! > {told}; wait; echo late")
    until = time.monotonic() + START_SECONDS
    while not (told.is_file() and told.read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.05)
    family = processes(server.process.pid)
    assert alive(int(told.read_text()))
    server.process.send_signal(number)
    assert server.process.wait(30) == 128 + number
    assert not alive(int(told.read_text()))
    assert "late" not in server.text()
    assert_gone(server, family)


def test_what_the_command_has_started_may_end_in_its_own_way(repository, start_server, tmp_path):
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    job = f"trap 'sleep 1; touch {cleaned}; exit' TERM; touch {ready}; sleep 300 & wait"
    server = start_server(repository, "--then", f'sh -c "{job}"; echo late')
    until = time.monotonic() + START_SECONDS
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert server.stop() == 128 + signal.SIGTERM
    assert cleaned.exists()


def test_a_command_that_a_signal_ends_gives_the_code_of_a_shell(repository, start_server):
    server = start_server(repository, "--then", "kill -KILL $$")
    assert server.process.wait(60) == 128 + signal.SIGKILL
    server = start_server(repository, "--then", "trap '' TERM; kill -TERM $PPID; sleep 300")
    assert server.process.wait(60) == 128 + signal.SIGTERM


def test_under_nohup_it_outlives_its_terminal(repository):
    command = [sys.executable, "-m", "twinbrush.server", "--repository", str(repository)]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    then = ["--then", "kill -HUP $PPID; sleep 1; exit 7"]
    done = subprocess.run(["nohup", *command, *ports, *then], timeout=60, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, cwd=ROOT)  # fmt: skip
    assert done.returncode == 7
