"""One running Triton server: its start, its Python stubs, its heartbeat, its end."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from twinbrush import doors, runtime_choice
from twinbrush.control import VARIABLE, Control
from twinbrush.runtime_choice import Runtime
from twinbrush.server import checks, scratch
from twinbrush.server.addresses import check_ports, for_grpc, for_http, host_port, local
from twinbrush.server.connections import open_connections
from twinbrush.server.errors import ServerError
from twinbrush.server.install import Triton
from twinbrush.server.log import CHATTER, Log, ServerOutput, is_warning
from twinbrush.server.processes import STUB, end_with_parent
from twinbrush.server.stubs import Stubs

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# A stub that ends while models load may have been ended by the server, whose reason follows.
REASON_SECONDS = 1.5
# Triton's protocols that change the server or map memory of its machine.
CLOSED = ("shared-memory", "model-repository", "trace", "logging")
TLS_FILES = ("--grpc-server-cert", "--grpc-server-key", "--grpc-root-cert")
FRONT_DOORS = ("text_to_image", "text_to_image_stream")
PORT_TAKEN = "already in use"  # in the last words of a server that found its port taken
LIVE_SECONDS = 5.0  # between two questions to a ready server whether it lives


@dataclass(frozen=True)
class ServerOptions:
    """How to run a server; the ports are on `address`, timeouts in seconds.

    Attributes:
        insecure: allows an old server on another address than loopback.
        expose_networks: lets clients call the networks, not only the two front doors.
        runtime: where the networks run; None is what the engine's `config.pbtxt` says.
        flags: of Triton, as they are.
    """

    repository: Path
    config_name: str | None = None
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_timeout: float = 600.0
    exit_timeout: float = 10.0
    heartbeat_timeout: float = 60.0
    verbose: bool = False
    insecure: bool = False
    expose_networks: bool = False
    runtime: Runtime | None = None
    flags: tuple[str, ...] = ()


class TritonProcess:
    """A server from start to end; leaving the context leaves nothing of it behind.

    Raises:
        ServerError: on entering, where the machine, the repository or a port cannot be used.
    """

    def __init__(self, triton: Triton, options: ServerOptions, log: Log | None = None):
        self._triton, self._options, self._log = triton, options, log or Log()
        self._served = options.repository  # the path that Triton knows
        self._output = ServerOutput(self._with_real_path)
        self._runtime = Runtime.SERVED  # until the options are checked
        self._was_ready = self._now = False
        self._next_question = 0.0  # when a ready server is asked next whether it lives
        self._mute_since: float | None = None  # the first of the questions without an answer

    def __enter__(self) -> TritonProcess:
        self._check_options()
        scratch.sweep()
        self._scratch = scratch.new_folder()
        self._region = scratch.new_region()
        self._started = time.monotonic()
        try:
            self._served = self._served_repository()
            self._start()
        except BaseException as error:
            scratch.remove(self._scratch, self._region)
            if isinstance(error, OSError):
                raise ServerError(self._why_not(error), worth_another_try=False) from None
            raise
        self._stubs = Stubs(self._process.pid)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        return self

    def _why_not(self, error: OSError) -> str:
        # That of copying a folder has a list of files, each with its error as text.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        text = f"the server cannot be started: {reason}"
        if os.strerror(errno.ENOSPC) in text:
            text += f"; give a folder with more space than {self._scratch.parent} in TMPDIR"
        return text

    def _served_repository(self) -> Path:
        """What Triton loads; the front doors alone where the engine runs the networks."""
        if self._runtime == Runtime.IN_PROCESS:
            return scratch.overlay(self._options.repository, self._scratch, FRONT_DOORS)
        return scratch.safe_repository(self._options.repository, self._scratch)

    def _start(self) -> None:
        backends, control = self._scratch / "backends", self._scratch / "control"
        backends.mkdir()
        control.mkdir()
        self._control = Control(control)
        environment = os.environ | self._triton.environment | {VARIABLE: str(control)}
        environment[runtime_choice.VARIABLE] = self._runtime
        if not self._options.expose_networks:
            environment[doors.VARIABLE] = secrets.token_hex(16)
        self._process = subprocess.Popen(
            self._command(self._triton.prepare_backends(backends)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def __exit__(self, *exc: object) -> None:
        failed = isinstance(exc[1], ServerError)
        if self._process.poll() is None and not failed and not self._now:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._options.exit_timeout + 2)  # Triton's own comes first
        with contextlib.suppress(ProcessLookupError):  # what is left, stubs included
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=2)
        scratch.remove(self._scratch, self._region)

    @property
    def pid(self) -> int:
        """Of the server, not of this launcher."""
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The server and its stubs, as the last `check` has seen them."""
        return [self._process.pid, *self._stubs.pids]

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def ready(self) -> bool:
        """Whether the server takes requests, for every model."""
        self._was_ready = self._ask("ready")
        return self._was_ready

    def _ask(self, health: str) -> bool:
        address = host_port(local(self._options.address), self._options.http_port)
        try:
            with NO_PROXY.open(f"http://{address}/v2/health/{health}", timeout=1) as answer:
                return answer.status == 200
        except (http.client.HTTPException, OSError):  # URLError is an OSError
            return False

    # The end ---------------------------------------------------------------------------------

    def begin_drain(self) -> bool:
        """Has the engine refuse new requests; returns False where no engine listens."""
        if self._control.silence() is None:
            return False
        try:
            self._control.request_drain()
        except OSError as error:
            self._log.complain(f"live requests are lost, because no drain can begin: {error}")
            return False
        return True

    @property
    def drained(self) -> bool:
        """Whether the live requests have ended, or the server has."""
        return self._control.drained or self._process.poll() is not None

    @property
    def streamed(self) -> float:
        """When a stream was answered last, by the monotonic clock; known once drained."""
        return self._control.streamed

    def connections(self) -> dict[tuple[str, str], int]:
        """Those of clients, each with the bytes that are still to reach it."""
        return open_connections((self._options.http_port, self._options.grpc_port))

    def end_now(self) -> None:
        """Makes leaving the context kill the server, without the time it takes to unload models."""
        self._now = True

    # The watch -------------------------------------------------------------------------------

    def check(self) -> None:
        """Returns while all is well.

        Raises:
            ServerError: the server or one of its stubs has ended, it or a front door is silent,
                or it is not ready in time.
        """
        dead = self._stubs.dead(self._output.started_models)
        code = self._process.poll()
        if code is not None and not (dead and " ended with " in dead):
            dead = None  # the server took its stubs along
        if code is not None and PORT_TAKEN in self._output.tail():
            self._check_ports()  # says it better
        if not self._was_ready:
            self._check_start(dead, code)
        if dead is not None:
            raise ServerError(f"{dead}: the server was ended", worth_another_try=True)
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ServerError(f"the server ended with {how}\n{self._output.tail()}", True)
        if self._was_ready:
            self._check_signs_of_life()

    def _check_start(self, dead: str | None, code: int | None) -> None:
        if dead is not None:
            self._await_reason()
        if code is not None or dead is not None:
            if code is not None:
                self._reader.join(timeout=2)
            unexplained = not self._output.load_failures()
            # The server may have reaped the stub, and with it the exit code.
            gave_up = dead is not None and dead.endswith(("exit code 1", "has ended"))
            crashed = dead is None and code is not None and code < 0
            passing = unexplained and (gave_up or crashed)
            raise ServerError(self._load_failure(dead), worth_another_try=False, passing=passing)
        if self.age > self._options.ready_timeout:
            text = f"not ready after {self._options.ready_timeout:.0f} s\n{self._output.tail()}"
            raise ServerError(text, worth_another_try=True)

    def _check_signs_of_life(self) -> None:
        """Of the front doors by their heartbeats, of the server by what it answers."""
        who, seconds = max(
            self._control.silence() or ("", 0.0), ("the server", self._muteness()),
            key=lambda sign: sign[1],
        )  # fmt: skip
        if seconds > self._options.heartbeat_timeout:
            text = f"{who} has given no sign of life for {seconds:.0f} s: the server was ended"
            raise ServerError(text, worth_another_try=True)

    def _muteness(self) -> float:
        """For how many seconds the server has not answered; each look then asks again."""
        asked = time.monotonic()
        if asked >= self._next_question:
            if self._ask("live"):
                self._mute_since, self._next_question = None, asked + LIVE_SECONDS
            else:
                self._mute_since = self._mute_since or asked
        return 0.0 if self._mute_since is None else time.monotonic() - self._mute_since

    def _await_reason(self) -> None:
        until = time.monotonic() + REASON_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            if self._output.load_failures():
                return
            time.sleep(0.05)

    def _load_failure(self, dead: str | None) -> str:
        if failures := self._output.load_failures():
            return "\n".join(f"{model} cannot be loaded: {r}" for model, r in failures.items())
        if self._output.wrong_flag:
            return f"Triton does not take its flags: {self._output.wrong_flag}"
        return f"{dead or 'the server ended while it loaded'}\n{self._output.tail()}"

    # The start -------------------------------------------------------------------------------

    def _check_options(self) -> None:
        options, triton = self._options, self._triton
        models = len(list(options.repository.glob("*/config.pbtxt")))
        if not models:
            text = f"{options.repository} holds no models: run `python -m export CHECKPOINT`"
            raise ServerError(text, worth_another_try=False)
        checks.check_config_name(options.repository, options.config_name)
        self._runtime = checks.check_runtime(
            options.repository, options.config_name, options.runtime, options.expose_networks
        )
        checks.check_door(options.address, triton.development, options.insecure)
        self._check_ports()
        checks.check_temporary_folder()
        if triton.development:
            checks.check_libpython(triton.environment["LD_LIBRARY_PATH"])
        every_model = triton.development and self._runtime == Runtime.SERVED
        stubs = models if every_model else len(FRONT_DOORS)
        if warning := checks.check_shared_memory(options.repository, stubs):
            self._log.complain(warning)

    def _check_ports(self) -> None:
        names = ("http_port", "grpc_port", "metrics_port")
        ports = {"--" + name.replace("_", "-"): getattr(self._options, name) for name in names}
        check_ports(self._options.address, ports)

    def _command(self, backends: Path) -> list[str]:
        options = self._options
        command = [
            str(self._triton.binary),
            f"--model-repository={self._served}",
            f"--backend-directory={backends}",
            f"--http-address={for_http(options.address)}",
            f"--grpc-address={for_grpc(options.address)}",
            f"--metrics-address={for_http(options.address)}",
            f"--http-port={options.http_port}",
            f"--grpc-port={options.grpc_port}",
            f"--metrics-port={options.metrics_port}",
            f"--exit-timeout-secs={options.exit_timeout:.0f}",
            "--disable-auto-complete-config",
        ]
        for backend in ("python", "onnxruntime"):
            if not (backends / backend / STUB).exists():
                continue  # native: it has no shared memory of its own
            region = f"{self._region}{backend}_"
            command.append(f"--backend-config={backend},shm-region-prefix-name={region}")
        if not Path("/dev/nvidiactl").exists():
            command.append("--allow-gpu-metrics=false")
        if options.config_name:
            command.append(f"--model-config-name={options.config_name}")
        check_flags(options.flags, command)
        if not options.expose_networks:
            command += _restrictions(options.flags)
        return command + list(options.flags)

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = self._output.add(raw)
            worth_showing = not CHATTER.match(line) and (self._was_ready or is_warning(line))
            if self._options.verbose or worth_showing:
                self._log.relay(line)

    def _with_real_path(self, line: str) -> str:
        """The line with the repository's own path, where Triton knows it by a link."""
        return line.replace(str(self._served), str(self._options.repository))


def check_flags(flags: tuple[str, ...], own: list[str]) -> None:
    """Raises ServerError where a flag for Triton is none, or is the launcher's to set."""
    taken = {flag.partition("=")[0] for flag in own[1:]} - {"--backend-config"}
    for flag in flags:
        name, _, value = flag.partition("=")
        closes_http = name == "--allow-http" and value.lower() not in ("true", "1", "on")
        closed = value.partition(":")[0].split(",") if name == "--http-restricted-api" else []
        if not flag.startswith("--") or "=" not in flag:
            text = f"{flag!r} is no flag of Triton: write --name=value after `--`"
        elif name in taken:
            text = f"{name} is set by the launcher and cannot be passed on to Triton"
        elif name in TLS_FILES and not os.access(value, os.R_OK):
            text = f"{flag}: there is no such file, or it cannot be read"
        elif closes_http or "health" in closed:
            text = f"{flag} cannot be used: the launcher asks /v2/health whether the server lives"
        else:
            continue
        raise ServerError(text, worth_another_try=False)


def _restrictions(flags: tuple[str, ...]) -> list[str]:
    """Flags that close what no client needs, unless an operator restricts by flags of their own.

    A client that may register shared memory could name the regions of the server's own stubs.
    """
    restricted = {
        "--grpc-restricted-protocol": f"{','.join(CLOSED)}:closed={secrets.token_hex(16)}",
        "--http-restricted-api": f"{','.join(CLOSED)}:closed={secrets.token_hex(16)}",
    }
    given = {flag.partition("=")[0] for flag in flags}
    return [f"{name}={value}" for name, value in restricted.items() if name not in given]
