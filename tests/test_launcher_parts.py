"""The launcher's parts: leftovers, children, CPUs, addresses, checks, the log."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinbrush import doors
from twinbrush.cpus import available_cpus
from twinbrush.server import addresses, checks, processes, scratch
from twinbrush.server.connections import open_connections
from twinbrush.server.errors import ServerError
from twinbrush.server.health import Health
from twinbrush.server.log import Log, is_warning, parse
from twinbrush.server.processes import STUB
from twinbrush.server.stubs import Stubs
from twinbrush.server.waits import Signals, Stopped

LAUNCHER = [sys.executable, "-m", "twinbrush.server"]


def refusal(*arguments: str, **options) -> str:
    done = subprocess.run([*LAUNCHER, *arguments], capture_output=True, text=True, timeout=60,
                          **options)  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


# Leftovers -----------------------------------------------------------------------------------


def test_only_what_dead_launchers_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "FALLBACKS", ())
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    me, start = os.getpid(), processes.start_time(os.getpid())
    here = f"ns{os.stat('/proc/self/ns/pid').st_ino}"
    assert start is not None
    dead = [
        f"twinbrush-{here}-{ended.pid}-{start}-abc",
        f"twinbrush-{here}-{me}-{int(start) - 1}-abc",
    ]
    dead_memory = f"triton_python_shm_twinbrush_{here}_{ended.pid}_{start}_77_python_1"
    elsewhere = f"twinbrush-{here}1-{ended.pid}-{start}-abc"  # perhaps alive, in a container
    kept = [f"twinbrush-{here}-{me}-{start}-abc", elsewhere, "twinbrush-notes", "twinbrush"]
    for name in (*dead, *kept):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / dead_memory).touch()
    assert {path.name for path in scratch.sweep()} == {*dead, dead_memory}
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_stubs_without_a_server_whose_launcher_is_gone_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "FALLBACKS", ())
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path)
    me, start = os.getpid(), processes.start_time(os.getpid())
    here = f"ns{os.stat('/proc/self/ns/pid').st_ino}"
    assert start is not None

    def stub(launcher_start: int) -> subprocess.Popen:
        name = f"/tmp/twinbrush-{here}-{me}-{launcher_start}-abc/backends/python/{STUB}"
        return subprocess.Popen([name, "60"], executable=shutil.which("sleep"))

    orphan, living = stub(int(start) - 1), stub(int(start))
    try:
        monkeypatch.setattr(scratch, "SERVER", "")  # as if the server were there
        scratch.sweep()
        assert orphan.poll() is None
        monkeypatch.setattr(scratch, "SERVER", "tritonserver")
        scratch.sweep()
        assert orphan.wait(5) == -signal.SIGKILL
        assert living.poll() is None
    finally:
        for process in (orphan, living):
            process.kill()
            process.wait()


def test_a_folder_of_this_launcher_names_its_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = scratch.new_folder()
    assert folder.parent == tmp_path
    here = f"ns{os.stat('/proc/self/ns/pid').st_ino}"
    owner = f"{here}-{os.getpid()}-{processes.start_time(os.getpid())}"
    assert folder.name.startswith(f"twinbrush-{owner}-")
    assert scratch.new_region().startswith(f"twinbrush_{owner.replace('-', '_')}_")


def test_a_temporary_folder_that_a_shell_would_split_is_passed_over(tmp_path, monkeypatch):
    unsafe = tmp_path / "with a blank"
    unsafe.mkdir()
    monkeypatch.setenv("TMPDIR", str(unsafe))
    monkeypatch.setattr(scratch, "FALLBACKS", (tmp_path / "missing", tmp_path))
    assert scratch.new_folder().parent == tmp_path
    monkeypatch.setattr(scratch, "FALLBACKS", (tmp_path / "missing",))
    with pytest.raises(ServerError, match="TMPDIR"):
        scratch.new_folder()


def test_children_are_read_from_the_kernels_list_or_searched(monkeypatch):
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"], start_new_session=True)
    try:
        until = time.monotonic() + 10
        while len(processes.children(parent.pid)) < 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        found = processes.children(parent.pid)
        assert set(processes._children_by_search(parent.pid)) == set(found)
        monkeypatch.setattr(processes, "_children_by_search", None)
        assert processes.children(parent.pid) == found, "a search is not needed here"
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert processes.children(parent.pid) == []


def test_a_stub_that_the_kernels_list_misses_has_not_ended(tmp_path, monkeypatch):
    """The list is not exact while other children come and go."""
    file = tmp_path / STUB
    file.symlink_to(shutil.which("sleep") or "sleep")
    stub = subprocess.Popen([file, "60"])
    stubs = Stubs(os.getpid())
    # This process may have other children, of other tests.
    monkeypatch.setattr(processes, "children", lambda _: [stub.pid])
    try:
        until = time.monotonic() + 10
        while not stubs._known:
            assert stubs.dead([]) is None
            assert time.monotonic() < until
        monkeypatch.setattr(processes, "children", lambda _: [])
        assert stubs.dead([]) is None
        stub.kill()
        while (dead := stubs.dead([])) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert dead.endswith("ended with signal 9 (Killed)")
    finally:
        stub.kill()
        stub.wait()
    assert (stubs.dead([]) or "").endswith("has ended")


# Waits ---------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[Signals]:
    yield Signals([signal.SIGUSR1])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes late must not end the tests


def test_a_wait_ends_with_the_first_process_that_ends(signals):
    living, ending = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "0.2"])
    try:
        began = time.monotonic()
        signals.wait(30, [living.pid, ending.pid])
        assert 0.1 < time.monotonic() - began < 10
        signals.wait(30, [ending.pid])  # it has ended, and is not collected
        ending.wait()
        signals.wait(30, [ending.pid])  # there is none
        assert time.monotonic() - began < 10
        began = time.monotonic()
        signals.wait(0.1, [living.pid])
        assert time.monotonic() - began >= 0.1
    finally:
        living.kill()
        living.wait()


def test_a_signal_ends_a_wait_also_one_that_begins_later(signals):
    began = time.monotonic()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    with pytest.raises(Stopped) as stopped:
        signals.wait(30)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    with pytest.raises(Stopped):
        signals.wait(30)
    assert signals.come == [signal.SIGUSR1]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_where_the_kernel_reports_no_ends_a_wait_is_short(signals, monkeypatch, error):
    def refused(_):
        raise error

    monkeypatch.setattr(os, "pidfd_open", refused)
    began = time.monotonic()
    signals.wait(30, [os.getpid()])
    assert time.monotonic() - began < 10


# CPUs ----------------------------------------------------------------------------------------


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path / "cgroup"


def test_the_quota_of_version_2_counts_also_where_a_parent_has_it(cgroup, tmp_path):
    cgroup.write_text("0::/pod/container\n")
    group(tmp_path, "pod", cpu__max="250000 100000\n")
    group(tmp_path, "pod/container", cpu__max="max 100000\n")
    assert available_cpus(cgroup, tmp_path) == 3


def test_the_quota_of_version_1_counts(cgroup, tmp_path):
    cgroup.write_text("4:memory:/\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    group(tmp_path, "cpu,cpuacct/docker/abc", cpu__cfs_quota_us="150000",
          cpu__cfs_period_us="100000")  # fmt: skip
    assert available_cpus(cgroup, tmp_path) == 2
    group(tmp_path, "cpu,cpuacct/docker/abc", cpu__cfs_quota_us="-1")
    assert available_cpus(cgroup, tmp_path) == 64


def test_without_a_quota_the_affinity_counts(cgroup, tmp_path, monkeypatch):
    assert available_cpus(cgroup, tmp_path) == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert available_cpus(cgroup, tmp_path) == 1


def test_a_session_takes_no_more_threads_than_the_quota(monkeypatch):
    from twinbrush.runtimes import onnx_runtime

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(onnx_runtime, "available_cpus", lambda: 3)
    assert onnx_runtime._session_options({}).intra_op_num_threads == 3
    given = {"parameters": {"intra_op_thread_count": {"string_value": "5"}}}
    assert onnx_runtime._session_options(given).intra_op_num_threads == 5


# Addresses and doors -------------------------------------------------------------------------


def test_addresses_are_written_as_each_reader_needs_them():
    assert addresses.host_port("::1", 80) == "[::1]:80"
    assert addresses.host_port("10.0.0.1", 80) == "10.0.0.1:80"
    assert [addresses.local(a) for a in ("::", "0.0.0.0", "10.0.0.1")] == [
        "::1", "127.0.0.1", "10.0.0.1",
    ]  # fmt: skip
    loopback = {a: addresses.is_loopback(a) for a in ("::1", "127.0.0.2", "localhost", "::")}
    assert loopback == {"::1": True, "127.0.0.2": True, "localhost": True, "::": False}


def test_an_address_that_is_not_this_machines_is_named(repository):
    text = refusal("--repository", str(repository), "--no-verify", "--address", "192.0.2.1")
    assert "--address 192.0.2.1: Cannot assign requested address" in text


def test_the_development_server_is_not_opened_to_the_network_by_accident(repository):
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    for address in ("0.0.0.0", "::"):
        text = refusal("--repository", str(repository), "--address", address, *ports)
        assert f"--address {address} would open the development server" in text
        assert "--insecure-development-server" in text
    checks.check_door("0.0.0.0", development=True, insecure=True)
    checks.check_door("0.0.0.0", development=False, insecure=False)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--http-port=1", "--http-port is set by the launcher"),
        ("nonsense", "'nonsense' is no flag of Triton"),
    ],
)
def test_a_flag_that_triton_cannot_take_is_named(repository, flag, reason):
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert reason in refusal("--repository", str(repository), *ports, "--", flag)


def test_calls_of_networks_need_the_key_where_there_is_one(monkeypatch):
    monkeypatch.delenv(doors.VARIABLE, raising=False)
    assert doors.parameters() is None
    assert doors.is_open("")
    monkeypatch.setenv(doors.VARIABLE, "secret")
    assert doors.is_open(json.dumps(doors.parameters()))
    for given in ("", "{}", '{"twinbrush_key": "guess"}', '{"twinbrush_key": 7}'):
        assert not doors.is_open(given)


# Machines ------------------------------------------------------------------------------------


def in_namespace(setup: str, *arguments: str) -> str:
    """What the launcher refuses with, where `setup` has changed the mounts it sees."""
    probe = subprocess.run(["unshare", "-m", "sh", "-c", setup], capture_output=True)
    if probe.returncode:
        pytest.skip("mounts cannot be changed here")
    command = ["unshare", "-m", "sh", "-c", f'{setup} && exec "$@"', "sh", *LAUNCHER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_too_little_shared_memory_is_named_with_what_is_needed(repository):
    setup = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    text = in_namespace(setup, "--repository", str(repository), *PORTS)
    assert "/dev/shm has 4 MB free and 7 Python stubs need 15 MB" in text
    assert "--shm-size" in text


def test_shared_memory_is_computed_from_the_largest_picture(repository):
    native, largest = checks.picture_sides(repository) or (0, 0)
    assert largest > native > 0
    stubs = 7 * checks.STUB_BYTES
    enough = stubs + checks.BYTES_A_PIXEL * largest**2
    assert checks.check_shared_memory(repository, 7, free=enough) is None
    warning = checks.check_shared_memory(repository, 7, free=enough - 1)
    assert warning is not None
    assert f"a picture of {largest}x{largest}" in warning
    with pytest.raises(ServerError, match="--shm-size"):
        checks.check_shared_memory(repository, 7, free=stubs)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_shared_memory_that_cannot_be_written_is_named(repository):
    setup = "mount -t tmpfs -o ro tmpfs /dev/shm"
    text = in_namespace(setup, "--repository", str(repository), *PORTS)
    assert "/dev/shm is not writable for this user" in text
    assert "mode 1777" in text


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_tmp_that_cannot_be_written_is_named(repository, tmp_path):
    # The repository may lie below /tmp, so the rest of /tmp is what turns read-only.
    setup = "mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp"
    text = in_namespace(setup, "--repository", str(repository), "--no-verify", *PORTS)
    assert "/tmp is missing or not writable, and Triton's Python backend needs it" in text
    assert "--tmpfs /tmp" in text


def test_a_name_that_no_configuration_has_is_refused(tmp_path):
    (tmp_path / "unet" / "configs").mkdir(parents=True)
    (tmp_path / "unet" / "configs" / "small.pbtxt").touch()
    checks.check_config_name(tmp_path, "small")
    checks.check_config_name(tmp_path, None)
    for name in ("smal", "*", "", "../small"):
        with pytest.raises(ServerError, match=r"--config-name .*: no model of"):
            checks.check_config_name(tmp_path, name)


def test_a_python_without_its_shared_library_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise OSError(name)

    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(checks.ctypes, "CDLL", missing)
    with pytest.raises(ServerError, match=f"install the package {name}"):
        checks.check_libpython(f"{tmp_path}:")
    (tmp_path / f"{name}.so.1.0").touch()
    checks.check_libpython(f"/nowhere:{tmp_path}")


# The log -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ('E1129 06:59:27.296306 17383 backend_model.cc:692] "ERROR: it \\"failed\\""',
         ("error", "triton", 'ERROR: it "failed"')),
        ("W1129 06:59:27.296306 17383 http.cc:12] no quotes", ("warning", "triton", "no quotes")),
        ("text_to_image: ERROR replying failed", ("error", "text_to_image", "replying failed")),
        ("ValueError: nonsense", ("info", "triton", "ValueError: nonsense")),
    ],
)  # fmt: skip
def test_a_line_of_the_server_has_a_level_and_a_source(line, parsed):
    assert parse(line) == parsed


def test_warnings_of_models_are_shown_while_they_load():
    assert is_warning("text_to_image_stream: WARNING there is little memory")
    assert not is_warning("text_to_image_stream: INFO calls are bounded by memory")
    assert not is_warning("W1129 06:59:27.296306 17383 http.cc:12] no quotes")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_full_disk_under_the_log_ends_nothing(form, monkeypatch):
    with open(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        monkeypatch.setattr(sys, "stderr", sys.stdout)
        log = Log(form)
        log.say("ready")
        log.complain("it ended")
        log.relay("a line")
        monkeypatch.undo()


def test_a_line_of_many_brackets_is_read():
    line = f"I1129 06:59:27.296306 17383 http.cc:12] {'[' * 100_000}"
    assert parse(line)[:2] == ("info", "triton")


def test_json_lines_carry_time_level_source_message_and_request_id(capsys):
    log = Log("json")
    log.say("ready")
    log.complain("it ended")
    log.relay("text_to_image: WARNING request id=ab-1: it was slow")
    out, err = capsys.readouterr()
    entries = [json.loads(line) for line in (out + err).splitlines()]
    assert [(e["source"], e["level"]) for e in entries] == [
        ("launcher", "info"), ("launcher", "error"), ("text_to_image", "warning"),
    ]  # fmt: skip
    assert all(e["time"].endswith("+00:00") for e in entries)
    assert [e.get("request_id") for e in entries] == [None, None, "ab-1"]


def test_tracebacks_of_the_launcher_and_of_its_threads_are_json_too():
    code = """
import threading, typer
from twinbrush.server import __main__ as launcher

def broken(*_):
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise KeyError("unforeseen")

launcher.chosen_ports = broken
typer.run(launcher.main)
"""
    command = [sys.executable, "-c", code, "--log-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    entries = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert [(e["source"], e["level"]) for e in entries] == [("launcher", "critical")] * 2
    assert "ZeroDivisionError" in entries[0]["message"]
    assert "KeyError: 'unforeseen'" in entries[1]["message"]


def test_a_probe_that_leaves_before_its_answer_is_not_logged(capfd):
    port = addresses.chosen_ports("127.0.0.1", 0, 0, 0)[0]
    Health().serve("127.0.0.1", port)
    before = threading.active_count()
    for _ in range(5):
        probe = socket.create_connection(("127.0.0.1", port))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        probe.close()  # with a reset
    time.sleep(0.2)
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


# Connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "host"), [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")])
def test_connections_are_known_by_what_their_clients_have_not_taken(family, host):
    with socket.create_server((host, 0), family=getattr(socket, family)) as listener:
        port = listener.getsockname()[1]
        assert open_connections([port]) == {}
        client = socket.create_connection((host, port))
        with client, listener.accept()[0] as server:
            ((ends, unsent),) = open_connections([port]).items()
            assert unsent == 0
            server.setblocking(False)
            sent = server.send(bytes(50_000_000))
            assert 0 < open_connections([port, 1])[ends] <= sent
            client.shutdown(socket.SHUT_WR)  # it goes on reading
            assert ends in open_connections([port])
        assert open_connections([port]) == {}
