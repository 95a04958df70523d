"""What the launcher watches, and what can go wrong as it starts: without a server."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from harness import ROOT, free_ports

from twinbrush.control import Control
from twinbrush.server import install
from twinbrush.server.errors import ServerError
from twinbrush.server.process import ServerOptions, TritonProcess, check_flags

# Signs of life ---------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path, monkeypatch) -> tuple[TritonProcess, list[bool]]:
    """A ready server of a heartbeat of 10 s, on a clock of the test's, and what it answers."""
    process, answers = TritonProcess(None, ServerOptions(tmp_path, heartbeat_timeout=10)), [True]
    process._control = Control(tmp_path)
    monkeypatch.setattr(process, "_ask", lambda health: answers[0])
    return process, answers


def at(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: seconds)


def test_a_front_door_without_a_heartbeat_ends_the_server(ready, monkeypatch):
    process, _ = ready
    at(monkeypatch, 100)
    process._check_signs_of_life()  # no door has begun
    process._control.beat("text_to_image")
    process._control.beat("text_to_image_stream")
    process._check_signs_of_life()
    at(monkeypatch, 109)
    process._control.beat("text_to_image_stream")
    process._check_signs_of_life()
    at(monkeypatch, 111)
    with pytest.raises(ServerError, match="text_to_image has given no sign of life for 11 s"):
        process._check_signs_of_life()


def test_a_server_that_answers_no_more_is_ended_only_if_it_stays_mute(ready, monkeypatch):
    process, answers = ready
    at(monkeypatch, 100)
    process._check_signs_of_life()
    answers[0] = False
    at(monkeypatch, 103)
    process._check_signs_of_life()  # not asked yet
    for second in (106, 112):
        at(monkeypatch, second)
        process._check_signs_of_life()
    answers[0] = True
    at(monkeypatch, 200)  # as after a launcher that was stopped for a while
    process._check_signs_of_life()
    answers[0] = False
    for second in (206, 211):
        at(monkeypatch, second)
        process._check_signs_of_life()
    at(monkeypatch, 217)
    with pytest.raises(ServerError, match="the server has given no sign of life for 11 s") as ended:
        process._check_signs_of_life()
    assert ended.value.worth_another_try


STUB = """
import threading
from twinbrush import orphans
orphans.PERIOD = 0.05
orphans.end_with_server()
print("watching", flush=True)
threading.Event().wait()
"""
SERVER = """
import subprocess, sys
stub = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(stub.stdout.readline().decode(), flush=True)
"""


def test_a_stub_that_waits_for_ever_ends_with_its_server():
    command = [sys.executable, "-c", SERVER, STUB]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == ""  # whose end is that of the stub


# The start -------------------------------------------------------------------------------------


def test_a_server_without_path_finds_the_shell_of_its_stubs(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "OPT", tmp_path)
    monkeypatch.delenv("PATH")
    assert install.find_triton().environment["PATH"].endswith(f":{os.defpath}")


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--allow-http=false", "the launcher asks"),
        ("--http-restricted-api=metadata,health:key=a", "the launcher asks"),
        ("--grpc-server-key=/nowhere", "--grpc-server-key=/nowhere: there is no such file"),
    ],
)
def test_flags_of_triton_that_cannot_work_are_refused(flag, reason):
    with pytest.raises(ServerError, match=reason):
        check_flags((flag,), ["tritonserver"])
    good = ("--allow-http=true", "--http-restricted-api=metadata:key=health", "--grpc-use-ssl=true")
    check_flags((*good, f"--grpc-server-cert={__file__}"), ["tritonserver"])


@pytest.mark.parametrize(
    "line", ["/opt/tritonserver: unrecognized option '--nonsense=4'", 'Bad option: "--rate-limit".']
)
def test_what_triton_says_of_a_flag_is_found_before_its_list_of_all(tmp_path, line):
    process = TritonProcess(None, ServerOptions(tmp_path))
    for text in (line, *["  --help"] * 500):
        process._output.add(text.encode())
    assert process._load_failure(None) == (
        f"Triton does not take its flags: {line.removeprefix('/opt/tritonserver: ')}"
    )


def test_a_disk_that_is_full_at_the_start_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    triton = SimpleNamespace(development=False, environment={}, prepare_backends=full_disk)
    options = ServerOptions(ROOT / "model_repository", None, "127.0.0.1", *free_ports(3))
    words = r"cannot be started: \[Errno 28\] No space left.*more space than"
    with pytest.raises(ServerError, match=words):
        TritonProcess(triton, options).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_port_that_another_launcher_took_meanwhile_is_a_sentence(tmp_path):
    """Two that start at once find the ports free; the server of one loses the race."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = TritonProcess(None, ServerOptions(tmp_path, http_port=port, grpc_port=1))
        process._process = SimpleNamespace(poll=lambda: 1, pid=0)
        process._stubs = SimpleNamespace(dead=lambda started: None)
        line = (
            f"failed to start GRPC service: Unavailable - Socket '127.0.0.1:{port}' already in use"
        )
        process._output.add(line.encode())
        with pytest.raises(ServerError, match=f"^port {port} of .* choose another: --http-port$"):
            process.check()


def full_disk(_):
    why = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'a' -> 'b'"
    raise shutil.Error([("a", "b", why)])


def test_many_files_are_allowed_as_far_as_the_machine_lets_it():
    code = (
        "import resource as r; from twinbrush.server.processes import allow_many_files as a;"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 200)); a(); print(r.getrlimit(r.RLIMIT_NOFILE));"
        "from gateway.server import allow_many_files as g; r.setrlimit(r.RLIMIT_NOFILE, (64, 200));"
        "g(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(200, 200)\n" * 2
