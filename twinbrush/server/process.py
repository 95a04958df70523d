"""One running Triton server: its start, its log, its Python stubs, its end."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from twinbrush.server.install import Triton

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SHARED_MEMORY = Path("/dev/shm")
LOAD_FAILURE = re.compile(
    r"(?:failed to load '([^']+)' version \d+|Poll failed for model directory '([^']+)'): "
    r"(.*?)(\\n\\nAt:|\"?$)"
)
SYNTAX_ERROR = re.compile(r"\[libprotobuf ERROR .*?\] (.*)")  # a line before its poll failure
INSTANCE = re.compile(r"TRITONBACKEND_ModelInstanceInitialize: (\w+)_\d+_\d+ ")
TABLE = re.compile(r"[+|]|$")
CHATTER = re.compile(r"[IW]\d{4} |Signal \(|[+|]|$")
# A stub that ends while models load may have been ended by the server, whose reason follows.
REASON_SECONDS = 1.5
TAIL_LINES = 200


class ServerError(Exception):
    """A server could not start or ended by itself.

    `worth_another_try` is False where the next start would fail in the same way. `passing` is
    True where a stub gave up during the start without a reason, which a busy machine can cause.
    """

    def __init__(self, message: str, worth_another_try: bool, passing: bool = False):
        super().__init__(message)
        self.worth_another_try, self.passing = worth_another_try, passing


@dataclass(frozen=True)
class ServerOptions:
    """How to run a server; the ports are on `address`, timeouts in seconds."""

    repository: Path
    config_name: str | None = None
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_timeout: float = 600.0
    exit_timeout: float = 10.0
    verbose: bool = False


class TritonProcess:
    """A server from start to end; leaving the context leaves nothing of it behind.

    Raises:
        ServerError: on entering, where the repository or a port cannot be used.
    """

    def __init__(self, triton: Triton, options: ServerOptions):
        self._triton, self._options = triton, options
        self._log: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._stubs: dict[int, str] = {}  # process id -> the model it runs
        self._was_ready = False

    def __enter__(self) -> TritonProcess:
        self._check_options()
        self._scratch = Path(tempfile.mkdtemp(prefix=f"twinbrush-{os.getpid()}-"))
        self._region = f"twinbrush_{os.getpid()}_{time.monotonic_ns()}_"
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                self._command(self._triton.prepare_backends(self._scratch)),
                env=os.environ | self._triton.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *exc: object) -> None:
        failed = isinstance(exc[1], ServerError)
        if self._process.poll() is None and not failed:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._options.exit_timeout + 2)  # Triton's own comes first
        with contextlib.suppress(ProcessLookupError):  # what is left, stubs included
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=2)
        for segment in SHARED_MEMORY.glob(f"*{self._region}*"):
            segment.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def ready(self) -> bool:
        """Whether the server takes requests, for every model."""
        url = f"http://{self._options.address}:{self._options.http_port}/v2/health/ready"
        try:
            with NO_PROXY.open(url, timeout=1) as answer:
                self._was_ready = answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
        return self._was_ready

    def check(self) -> None:
        """Returns while all is well.

        Raises:
            ServerError: the server or one of its stubs has ended, or it is not ready in time.
        """
        dead = self._dead_stub()
        if dead is not None and not self._was_ready:
            self._await_reason()
        code = self._process.poll()
        if not self._was_ready and (code is not None or dead is not None):
            if code is not None:
                self._reader.join(timeout=2)
            unexplained = not self._load_failures()
            passing = unexplained and dead is not None and dead.endswith("exit code 1")
            raise ServerError(self._load_failure(dead), worth_another_try=False, passing=passing)
        if dead is not None:
            raise ServerError(f"{dead}: the server was ended", worth_another_try=True)
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ServerError(f"the server ended with {how}\n{self._tail()}", True)
        if not self._was_ready and self.age > self._options.ready_timeout:
            text = f"not ready after {self._options.ready_timeout:.0f} s\n{self._tail()}"
            raise ServerError(text, worth_another_try=True)

    def _check_options(self) -> None:
        options = self._options
        if not any(options.repository.glob("*/config.pbtxt")):
            text = f"{options.repository} holds no models: run `python -m export CHECKPOINT`"
            raise ServerError(text, worth_another_try=False)
        taken: dict[int, str] = {}
        for name in ("http_port", "grpc_port", "metrics_port"):
            port, flag = getattr(options, name), "--" + name.replace("_", "-")
            if (other := taken.setdefault(port, flag)) != flag:
                text = f"{other} and {flag} are both {port}: each needs a port of its own"
                raise ServerError(text, worth_another_try=False)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((options.address, port))
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or error
                    text = f"port {port} of {options.address}: {reason}; choose another: {flag}"
                    raise ServerError(text, worth_another_try=False) from None

    def _command(self, backends: Path) -> list[str]:
        options = self._options
        command = [
            str(self._triton.binary),
            f"--model-repository={options.repository.resolve()}",
            f"--backend-directory={backends}",
            f"--http-address={options.address}",
            f"--grpc-address={options.address}",
            f"--metrics-address={options.address}",
            f"--http-port={options.http_port}",
            f"--grpc-port={options.grpc_port}",
            f"--metrics-port={options.metrics_port}",
            f"--exit-timeout-secs={options.exit_timeout:.0f}",
            "--disable-auto-complete-config",
        ]
        for backend in ("python", "onnxruntime"):
            if not (backends / backend / "triton_python_backend_stub").exists():
                continue  # native: it has no shared memory of its own
            region = f"{self._region}{backend}_"
            command.append(f"--backend-config={backend},shm-region-prefix-name={region}")
        if not Path("/dev/nvidiactl").exists():
            command.append("--allow-gpu-metrics=false")
        if options.config_name:
            command.append(f"--model-config-name={options.config_name}")
        return command

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            self._log.append(line)
            worth_showing = self._was_ready and not CHATTER.match(line)
            if self._options.verbose or worth_showing:
                with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that left
                    print(line, file=sys.stderr, flush=True)

    def _dead_stub(self) -> str | None:
        """A sentence on a Python stub that has ended, or None."""
        living = dict(_children(self._process.pid))
        for pid, state in living.items():
            if state.code is not None:
                model = self._stubs.get(pid) or self._without_stub(living)
                return f"the Python stub of {model} ended with {_how(state.code)}"
            if state.model:
                self._stubs[pid] = state.model
        for pid, model in self._stubs.items():
            if pid not in living and self._process.poll() is None:
                return f"the Python stub of {model} has ended"
        return None

    def _without_stub(self, living: dict[int, _Child]) -> str:
        """The models that were told to start and have no stub: it ended before it was seen."""
        told = {match[1] for line in list(self._log) if (match := INSTANCE.search(line))}
        missing = told - {child.model for child in living.values()}
        return " or ".join(sorted(missing)) or "a model"

    def _await_reason(self) -> None:
        until = time.monotonic() + REASON_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            if self._load_failures():
                return
            time.sleep(0.05)

    def _load_failures(self) -> dict[str, str]:
        """The models that the server could not load, each with its reason."""
        failures, syntax_error = {}, ""
        for line in list(self._log):
            if match := SYNTAX_ERROR.search(line):
                syntax_error = f" ({match[1]})"
            elif match := LOAD_FAILURE.search(line):
                reason = match[3].replace("\\n", " ").strip()
                failures[match[1] or match[2]] = reason + syntax_error
                syntax_error = ""
        return failures

    def _load_failure(self, dead: str | None) -> str:
        if failures := self._load_failures():
            return "\n".join(f"{model} cannot be loaded: {r}" for model, r in failures.items())
        return f"{dead or 'the server ended while it loaded'}\n{self._tail()}"

    def _tail(self) -> str:
        said = [line for line in list(self._log) if not TABLE.match(line)]
        return "\n".join(said[-12:])


@dataclass(frozen=True)
class _Child:
    """A child process: the model its command line names, and its wait status once it ended."""

    model: str | None
    code: int | None


def _children(parent: int) -> list[tuple[int, _Child]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) != parent:
                continue
            arguments = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except (OSError, IndexError):
            continue  # it ended while we looked
        code = int(stat[-1]) if stat[0] == "Z" else None
        found.append((int(folder.name), _Child(_model_of(arguments), code)))
    return found


def _model_of(arguments: list[str]) -> str | None:
    """The model that a stub runs; its instance is `MODEL_0_0` in its command line."""
    if not arguments[0].endswith("triton_python_backend_stub"):
        return None
    instances = [m[1] for a in arguments if (m := re.fullmatch(r"(\w+)_\d+_\d+", a))]
    return instances[-1] if instances else Path(arguments[0]).name


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)} ({signal.strsignal(os.WTERMSIG(status))})"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _end_with_parent() -> None:
    """Asks the kernel to end the server when this process is gone, however it went."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
