"""A server under test in processes of its own, and what `/proc` says of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as grpc

from twinbrush.server import processes
from twinbrush.server.addresses import chosen_ports
from twinbrush_client import Client

START_SECONDS = 180.0
HOST = "127.0.0.1"
PROC = Path("/proc")


@dataclass
class Serving:
    """A launcher, and the server that it runs.

    Attributes:
        launcher: its process.
        output: file of its log.
        http, grpc, metrics: ports.
    """

    launcher: subprocess.Popen
    output: Path
    http: int
    grpc: int
    metrics: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.grpc}"

    @property
    def server(self) -> int:
        """The process of the Triton server.

        Raises:
            RuntimeError: there is none.
        """
        for pid in processes.children(self.launcher.pid):
            if b"tritonserver" in _command_line(pid):
                return pid
        raise RuntimeError(f"no server runs: {self.output.read_text()[-2000:]}")

    def stub(self, model: str) -> int | None:
        """The process of a model's Python stub, if it has one."""
        for pid in processes.children(self.server):
            if re.search(rb"\0" + model.encode() + rb"_\d+_\d+\0", _command_line(pid)):
                return pid
        return None

    def tree(self) -> list[int]:
        """The server and its stubs."""
        return [self.server, *processes.children(self.server)]

    def wait_until_ready(self, times: int = 1) -> None:
        """Waits until the log has said `times` times that the server is ready.

        Raises:
            RuntimeError: the launcher ended, or it takes too long.
        """
        until = time.monotonic() + START_SECONDS
        while self.output.read_text().count("ready in") < times:
            if self.launcher.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server is not ready: {self.output.read_text()[-2000:]}")
            time.sleep(0.05)

    def client(self, timeout: float = 60.0) -> Client:
        """A client that never retries."""
        return Client(self.address, timeout=timeout, max_retries=0)

    def unet_calls(self) -> int:
        """Calls of the UNet that are done, by the server's own count."""
        with grpc.InferenceServerClient(self.address) as client:
            answer = client.get_inference_statistics("unet", as_json=True)
            assert answer is not None
            return int(answer["model_stats"][0].get("execution_count", 0))

    def resources(self) -> dict[str, float]:
        """Memory in MB, threads and descriptors of the server and its stubs, `/dev/shm` in MB."""
        tree = self.tree()
        status = [(PROC / str(pid) / "status").read_text() for pid in tree]

        def total(field: str) -> int:
            return sum(int(m[1]) for text in status if (m := re.search(rf"{field}:\s+(\d+)", text)))

        shared = os.statvfs("/dev/shm")
        return {
            "rss_mb": total("RssAnon") / 1024,
            "threads": total("Threads"),
            "descriptors": sum(len(os.listdir(PROC / str(pid) / "fd")) for pid in tree),
            "shm_mb": (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 2**20,
        }


@contextmanager
def serving(repository: Path, *flags: str) -> Iterator[Serving]:
    """A server on free ports, restarted when it ends by itself, and stopped on leaving."""
    http, grpc_port, metrics = chosen_ports(HOST, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        command = [
            sys.executable, "-m", "twinbrush.server", "--repository", str(repository), "--restart",
            "--http-port", str(http), "--grpc-port", str(grpc_port),
            "--metrics-port", str(metrics), *flags,
        ]  # fmt: skip
        with output.open("w") as file:
            launcher = subprocess.Popen(command, stdout=file, stderr=file)
        server = Serving(launcher, output, http, grpc_port, metrics)
        try:
            server.wait_until_ready()
            with server.client() as client:  # the first request loads what is loaded late
                client.generate("a red circle")
            yield server
        finally:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
                try:
                    launcher.wait(60)
                except subprocess.TimeoutExpired:
                    launcher.kill()


def _command_line(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""
