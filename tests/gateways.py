"""The gateway as a process in front of the real server, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, free_ports

START_SECONDS = 120


@dataclass
class Answer:
    """Of HTTP."""

    status: int
    headers: Message
    data: bytes

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class Gateway:
    """A running `python -m gateway`."""

    process: subprocess.Popen
    output: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self) -> str:
        return self.output.read_text()

    def call(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> Answer:
        """GET, or POST of a JSON body; bytes are sent as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"content-type": "application/json"} | headers
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def metrics(self) -> dict[str, float]:
        lines = self.call("/metrics").data.decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + START_SECONDS
        while text not in self.text():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > until:
                raise AssertionError(f"no {text!r}: {self.text()}")
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


StartGateway = Callable[..., Gateway]


@pytest.fixture(scope="session")
def start_gateway(tmp_path_factory) -> Iterator[StartGateway]:
    """Starts gateways on free ports and waits for them; those that live are stopped at the end.

    Without `page` they are there in a fraction of the time.
    """
    started: list[Gateway] = []

    def start(
        *servers: str,
        flags: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        page: bool = False,
    ) -> Gateway:
        (port,) = free_ports(1)
        output = tmp_path_factory.mktemp("gateway") / "output.txt"
        named = [part for server in servers for part in ("--server", server)]
        command = [sys.executable, "-m", "gateway", *named, "--port", str(port), *flags]
        command += [] if page else ["--no-page"]
        with output.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env=os.environ | (env or {})
            )
        gateway = Gateway(process, output, port)
        started.append(gateway)
        gateway.wait_for("gateway: http")
        return gateway

    yield start
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.stop()


@pytest.fixture(scope="session")
def gateway(server, start_gateway) -> Gateway:
    """A gateway without keys and page in front of the shared server."""
    return start_gateway(server.address)
