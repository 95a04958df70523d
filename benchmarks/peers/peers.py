"""The peers: how each is started, asked whether it is ready, and sent a request."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.http_server import KINDS
from benchmarks.peers.load import Ask, Send
from benchmarks.process_memory import Usage, watch
from twinbrush.runtime_choice import Runtime
from twinbrush.server.addresses import chosen_ports

READY_SECONDS = 600.0
ASK_SECONDS = 900
NETWORKS = ("clip_text", "fusion", "unet", "vqgan_decoder")
LOOP = Path(__file__).parent / "loop"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Ports:
    """Of one server; FastAPI listens on `http` alone."""

    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True)
class Peer:
    """One way to serve a checkpoint.

    Attributes:
        name: in results.
        command: (folder, ports) -> what starts it.
        ready: path that answers 200 once the checkpoint is loaded.
        sender: makes the function that sends a request.
    """

    name: str
    command: Callable[[Path, Ports], list[str]]
    ready: str
    sender: Callable[[Ports], Send]


@dataclass
class Running:
    """A peer that is ready.

    Attributes:
        send: sends a request and waits for its PNG.
        start_seconds: from the start of its process to its readiness.
        usage: memory so far.
    """

    send: Send
    start_seconds: float
    usage: Usage


@contextmanager
def running(peer: Peer, folder: Path, log: Path) -> Iterator[Running]:
    """A peer from its start to its end; its output goes to `log`.

    Raises:
        RuntimeError: it ended or was not ready in time.
    """
    ports = Ports(*chosen_ports("127.0.0.1", 0, 0, 0))
    started = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(peer.command(folder, ports), stdout=output, stderr=output)
        try:
            with watch(process.pid) as usage:
                while not _answers(f"http://127.0.0.1:{ports.http}{peer.ready}"):
                    late = time.monotonic() - started > READY_SECONDS
                    if late or process.poll() is not None:
                        raise RuntimeError(f"{peer.name} did not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.1)
                yield Running(peer.sender(ports), round(time.monotonic() - started, 1), usage)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with NO_PROXY.open(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def loop_repository(repository: Path, checkpoint: Path, made: Path) -> Path:
    """A repository of the same networks with the looping model in place of the front doors."""
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(LOOP, made / "loop")
    for name in NETWORKS:
        (made / name).symlink_to((repository / name).resolve())
    (made / "loop" / "1" / "checkpoint.json").write_text(json.dumps(str(checkpoint.resolve())))
    return made


def _http_command(kind: str) -> Callable[[Path, Ports], list[str]]:
    def command(folder: Path, ports: Ports) -> list[str]:
        served = folder / ("openvino" if kind == "openvino-genai" else "checkpoint")
        module = "benchmarks.peers.http_server"
        return [sys.executable, "-m", module, kind, str(served), str(ports.http)]

    return command


def _triton_command(folder: Path, ports: Ports, repository: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "twinbrush.server", "--repository", str(repository),
        "--http-port", str(ports.http), "--grpc-port", str(ports.grpc),
        "--metrics-port", str(ports.metrics), *flags,
    ]  # fmt: skip


def _twinbrush_command(folder: Path, ports: Ports) -> list[str]:
    return _triton_command(
        folder, ports, folder / "model_repository", "--runtime", str(Runtime.IN_PROCESS)
    )


def _loop_command(folder: Path, ports: Ports) -> list[str]:
    made = loop_repository(folder / "model_repository", folder / "checkpoint", folder / "loop")
    return _triton_command(folder, ports, made, "--expose-networks", "--no-verify")


def _http_sender(ports: Ports) -> Send:
    def send(ask: Ask) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports.http}/generate",
            json.dumps(asdict(ask)).encode(),
            {"Content-Type": "application/json"},
        )
        with NO_PROXY.open(request, timeout=ASK_SECONDS) as answer:
            return answer.read()

    return send


def _triton_sender(model: str, fields: Callable[[Ask], dict[str, Any]]) -> Callable[[Ports], Send]:
    types = {bytes: ("BYTES", object), int: ("INT32", np.int32)}

    def sender(ports: Ports) -> Send:
        import tritonclient.grpc as grpc

        client = grpc.InferenceServerClient(f"127.0.0.1:{ports.grpc}")

        def send(ask: Ask) -> bytes:
            tensors = []
            for name, value in (fields(ask) | {"seed": ask.seed}).items():
                wire, dtype = ("INT64", np.int64) if name == "seed" else types[type(value)]
                tensor = grpc.InferInput(name, [1], wire)
                tensor.set_data_from_numpy(np.array([value], dtype))
                tensors.append(tensor)
            result = client.infer(model, tensors, client_timeout=ASK_SECONDS)
            image = result.as_numpy("image") if result else None
            if image is None:
                raise RuntimeError(f"{model} gave no image")
            return image[0]

        return send

    return sender


def _loop_fields(ask: Ask) -> dict[str, Any]:
    return {"prompt": ask.prompt.encode(), "steps": ask.steps, "side": ask.side}


def _twinbrush_fields(ask: Ask) -> dict[str, Any]:
    size = {"width": ask.side, "height": ask.side, "image_format": b"png"}
    return {"prompt": ask.prompt.encode(), "steps": ask.steps, **size}


PEERS = (
    *(Peer(kind, _http_command(kind), "/ready", _http_sender) for kind in KINDS),
    Peer("bls-loop", _loop_command, "/v2/health/ready", _triton_sender("loop", _loop_fields)),
    Peer(
        "twinbrush", _twinbrush_command, "/v2/health/ready",
        _triton_sender("text_to_image", _twinbrush_fields),
    ),
)  # fmt: skip
