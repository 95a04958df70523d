"""Fixtures that all tests share: tiny repositories, the engine in-process, and the real server."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import pytest
import torch
import typer
from families import FAMILIES, shallow, write_family
from typer.testing import CliRunner, Result

from checkpoints import tiny_checkpoint
from export.__main__ import main as export_main
from export.checkpoint import open_checkpoint
from export.convert import OPSET, to_onnx, trace
from export.memory import measure
from export.part import Part
from export.precision import Precision, in_precision
from export.repository import build
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.engine import Engine
from twinbrush.engine.prompt import PromptTokenizer
from twinbrush.runtimes.onnx_runtime import LocalModels

ROOT = Path(__file__).parent.parent
START_SECONDS = 120
# Settings of modules that change no graph; the last is a set, in another order in every process.
NAMES_AND_ORDERS = ("name_or_path", "_name_or_path", "_use_default_values")


def skeleton(folder: Path) -> Path:
    """A copy of the repository's folders and configurations, without weights."""
    ignore = shutil.ignore_patterns("*.onnx*", "*.json", "__pycache__")
    shutil.copytree(ROOT / "model_repository", folder, ignore=ignore)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def export_command(*arguments: str | Path) -> Result:
    """`python -m export`, in this process, which has its heavy imports already."""
    app = typer.Typer()
    app.command()(export_main)
    try:
        return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    finally:
        logging.disable(logging.NOTSET)  # the command keeps warnings off its screen


def identity(part: Part, precision: Precision) -> str:
    """Of what a conversion depends on; wherever a model was read from, it is the same."""
    made_of = hashlib.sha256(structure(part, precision).encode())
    for tensor in part.module.state_dict().values():
        made_of.update(tensor.numpy().tobytes())
    return made_of.hexdigest()


def structure(part: Part, precision: Precision) -> str:
    """Of what a traced graph depends on: all but the values of weights."""
    made_of = hashlib.sha256(f"{part.name} {part.inputs} {part.outputs} {precision}".encode())
    weights = part.module.state_dict(keep_vars=True)
    for name, module in part.module.named_modules():
        settings = dict(vars(module))
        for config in (settings.pop("config", {}), settings.pop("_internal_dict", {})):
            settings |= config if isinstance(config, dict) else config.to_dict()
        plain = {k: v for k, v in settings.items() if is_plain(v) and k not in NAMES_AND_ORDERS}
        made_of.update(f"{name} {type(module)} {json.dumps(plain, sort_keys=True)}".encode())
        for key, value in settings.items():
            if isinstance(value, torch.Tensor):
                made_of.update(f"{key} {value.tolist()}".encode())
    for name, tensor in part.module.named_buffers():
        if name not in weights:
            made_of.update(f"{name} {tensor.tolist()}".encode())
    tied: dict[int, str] = {}
    for name, tensor in weights.items():
        first = tied.setdefault(id(tensor), name)
        made_of.update(f"{name} {first} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return made_of.hexdigest()


def is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def conversions(tmp_path_factory, worker_id) -> Iterator[None]:
    """Export traces a structure once, which takes 3 to 20 s, and converts the same weights once."""
    run = tmp_path_factory.getbasetemp()
    shared = run if worker_id == "master" else run.parent  # all workers'
    converted, traced = shared / "conversions", shared / "traces"
    converted.mkdir(exist_ok=True)
    traced.mkdir(exist_ok=True)

    def kept_trace(part: Part, precision: Precision, opset: int = OPSET):
        file = traced / f"{structure(part, precision)}-{opset}.onnx"
        with one_process(file):
            if not file.exists():
                begun = tmp_path_factory.mktemp("trace") / "model.onnx"
                trace(part, precision, opset).save(begun)
                begun.rename(file)
        program = torch.onnx.ONNXProgram(onnx_ir.load(file), None)
        program.apply_weights(in_precision(part, precision).state_dict())
        return program

    def kept(part: Part, file: Path, precision: Precision = Precision.FP32) -> tuple[int, int]:
        made = converted / identity(part, precision)
        if not made.exists():
            folder = tmp_path_factory.mktemp("conversion")
            nodes = to_onnx(part, folder / "model.onnx", precision)
            (folder / "nodes.json").write_text(json.dumps(nodes))
            with suppress(OSError):  # another worker was first
                folder.rename(made)
        shutil.copy(made / "model.onnx", file)
        return tuple(json.loads((made / "nodes.json").read_text()))

    gc.collect()
    gc.freeze()  # libraries ask for collections, which the many objects of torch make slow
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("export.convert.trace", kept_trace)
        for module in ("repository", "gate"):
            patched.setattr(f"export.{module}.to_onnx", kept)
        patched.setattr("export.repository.measure", once(measure, converted))
        yield


@contextmanager
def one_process(file: Path) -> Iterator[None]:
    """While one test process makes a file, the others wait for it."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(measure_memory, kept: Path):
    """`export.memory.measure`, which starts a process, once for each file."""

    def measured(model: Path, config: Path, sides: list[int], tokens: int) -> dict:
        files = model.read_bytes() + config.read_bytes()
        known = kept / f"memory-{hashlib.sha256(files).hexdigest()}-{sides}-{tokens}.json"
        if not known.exists():
            made = json.dumps(measure_memory(model, config, sides, tokens))
            known.with_suffix(f".{os.getpid()}").write_text(made)
            known.with_suffix(f".{os.getpid()}").rename(known)
        return json.loads(known.read_text())

    return measured


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny random checkpoint that takes guidance in two rows."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def repository(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint, exported."""
    folder = skeleton(tmp_path_factory.mktemp("served") / "model_repository")
    build(open_checkpoint(tiny), folder)
    return folder


@pytest.fixture(scope="session")
def distilled_repository(repository, tmp_path_factory) -> Path:
    """The tiny checkpoint with a UNet that takes the guidance scale as an embedding, exported."""
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("lcm") / "lcm", timestep_cond=16)
    folder = tmp_path_factory.mktemp("served-lcm") / "model_repository"
    shutil.copytree(repository, folder)
    build(open_checkpoint(checkpoint), folder, only=["unet"])
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Writes and exports a shallow family, once: its checkpoint and its repository."""
    made: dict[str, tuple[Path, Path]] = {}
    folder = tmp_path_factory.mktemp("families")

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            source = write_family(folder / name.replace("/", "--"), shallow(FAMILIES[name]))
            repository = skeleton(folder / f"{source.name}-served")
            build(open_checkpoint(source), repository)
            made[name] = source, repository
        return made[name]

    return export


def open_engine(repository: Path, models=None, **options) -> Engine:
    folder = repository / "text_to_image_stream" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    models = models or LocalModels(repository)
    return Engine(models, config, PromptTokenizer(folder, config), **options)


@pytest.fixture
def engine(repository) -> Iterator[Engine]:
    engine = open_engine(repository)
    yield engine
    engine.close()


@dataclass
class Server:
    """A running `python -m twinbrush.server`."""

    process: subprocess.Popen
    output: Path
    http: int
    grpc: int
    metrics: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        until = time.monotonic() + seconds
        while text not in self.text():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > until:
                raise AssertionError(f"no {text!r}, exit code {self.process.poll()}: {self.text()}")
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5).close()
                return
            assert self.process.poll() is None, self.text()
            time.sleep(0.01)
        raise AssertionError(f"the server is not ready: {self.text()}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def heard(number: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile hear a signal, also where the tests ignore it.

    Not by a function in the child: that needs a fork, which threads of gRPC may not survive.
    """
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory) -> Iterator[StartServer]:
    """Starts servers on free ports, without waiting; those that live are stopped at the end."""
    started: list[Server] = []

    def start(repository: Path, *flags: str, env: dict[str, str] | None = None) -> Server:
        http, grpc, metrics = free_ports(3)
        output = tmp_path_factory.mktemp("server") / "output.txt"
        command = [
            sys.executable, "-m", "twinbrush.server", "--repository", str(repository),
            "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics),
            *flags,
        ]  # fmt: skip
        with output.open("w") as file, heard(signal.SIGHUP):
            process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
        server = Server(process, output, http, grpc, metrics)
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(repository, start_server) -> Server:
    """The real server on the tiny checkpoint, shared by all end-to-end tests."""
    server = start_server(repository, "--restart")
    server.wait_for("ready in")
    return server


@pytest.fixture(autouse=True)
def shared_server_is_up(request) -> None:
    """Waits while the shared server starts again: Triton 24.10 can crash as a client leaves."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_ready()
