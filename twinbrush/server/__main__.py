"""`python -m twinbrush.server`: finds a Triton server, runs it, and watches what it depends on.

Takes the server of `/opt/tritonserver` where there is one, else the one of the pytriton wheel.
Triton never restarts a Python stub that died, and requests that wait for it would hang; so
this process watches the stubs, ends the server at once when one dies, and sweeps the shared
memory it leaves. Knows nothing of diffusion.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated

import typer

from twinbrush.runtime_choice import Runtime
from twinbrush.server import manifest, plans
from twinbrush.server.addresses import check_ports, chosen_ports, host_port, local
from twinbrush.server.errors import ServerError
from twinbrush.server.health import Health
from twinbrush.server.install import NoTriton, find_triton
from twinbrush.server.log import Log, LogFormat
from twinbrush.server.process import ServerOptions, TritonProcess
from twinbrush.server.processes import allow_many_files, end_with_parent
from twinbrush.server.waits import SIGNALLED, Signals, Stopped

START_POLL_SECONDS = 0.25
WATCH_SECONDS = 1.0  # between two looks at what gives no sign when it changes: the heartbeat
DRAIN_POLL_SECONDS = 0.05
ANSWER_SECONDS = 0.5  # that the last answer takes from the engine to its connection
# After an answer over a stream that is still open, which its client may be reading: gRPC drops what
# a client has not read when its connection ends before the stream.
READ_SECONDS = 15.0
STARTS = 3  # tries, where a stub or the server ends without a reason while it starts
RESTART_PAUSE = 2.0  # seconds between the end of a server and the start of the next
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMAND_SECONDS = 5.0  # that a command has to end after SIGTERM


def serve(
    options: ServerOptions,
    log: Log,
    health: Health,
    signals: Signals,
    drain_seconds: float,
    then: str | None = None,
) -> None:
    """Runs one server until a signal comes or something it depends on dies.

    With `then`, a shell command, the server lives as long as that command.

    Raises:
        ServerError: it could not start, or it ended by itself; the message says why.
        Stopped: a signal has come, or the command has ended.
    """
    triton = find_triton()
    log.say(f"using {triton.description}")
    with TritonProcess(triton, options, log) as process:
        try:
            while not process.ready():
                process.check()
                signals.wait(START_POLL_SECONDS, process.pids)
            health.state = "ready"
            log.say(f"ready in {process.age:.1f} s, serving {options.repository}")
            if then is None:
                _say_addresses(options, log)
            while then is None:
                process.check()
                signals.wait(WATCH_SECONDS, process.pids)
        except Stopped:  # also before it was seen to be ready: clients may have seen it first
            health.state = "draining"
            drain(process, signals, drain_seconds, log)
            raise
        grpc = host_port(local(options.address), options.grpc_port)
        raise Stopped(_run(then, process, signals, local(options.address), grpc))


def _say_addresses(options: ServerOptions, log: Log) -> None:
    ports = options.grpc_port, options.http_port, options.metrics_port
    grpc, http, metrics = (host_port(options.address, port) for port in ports)
    log.say(f"  gRPC    {grpc}")
    log.say(f"  HTTP    http://{http}")
    log.say(f"  metrics http://{metrics}/metrics")


def drain(process: TritonProcess, signals: Signals, seconds: float, log: Log) -> None:
    """Has new requests refused, and waits until the live ones have ended.

    Then waits until clients have read the answers. A second signal, or `seconds`, ends the wait.
    """
    if seconds <= 0 or not process.begin_drain():
        return
    log.say(f"draining: live requests have {seconds:g} s to end")
    come, until = len(signals.come), time.monotonic() + seconds
    while len(signals.come) == come and time.monotonic() < until:
        if process.drained:
            time.sleep(ANSWER_SECONDS)
            _await_readers(process, signals, come, until, log)
            break
        time.sleep(DRAIN_POLL_SECONDS)
    else:
        log.say("not all live requests have ended")
    # Triton would answer NOT_FOUND while it unloads models, and clients would not try elsewhere.
    process.end_now()


def _await_readers(
    process: TritonProcess, signals: Signals, come: int, until: float, log: Log
) -> None:
    """Waits until no client that was connected at the end of the drain has something to read.

    What is on its way to a client is seen. What a client has taken and not read yet is not: after
    a stream, its connection is left open for a while.
    """
    clients, said = process.connections(), False
    while len(signals.come) == come and time.monotonic() < until:
        now = process.connections()
        clients = {ends: now[ends] for ends in clients.keys() & now.keys()}
        reading = time.monotonic() - process.streamed < READ_SECONDS
        if not clients or not (reading or any(clients.values())):
            return
        if not said:
            log.say(f"waiting until clients have read their answers; connections: {len(clients)}")
            said = True
        time.sleep(DRAIN_POLL_SECONDS)


def _run(command: str, process: TritonProcess, signals: Signals, host: str, address: str) -> int:
    """Runs a shell command while the server lives; returns its exit code."""
    environment = os.environ | {"TWINBRUSH_SERVER": address, "no_grpc_proxy": host}
    running = subprocess.Popen(
        command, shell=True, env=environment, start_new_session=True, preexec_fn=end_with_parent
    )
    try:
        while (code := running.poll()) is None:
            process.check()
            signals.wait(WATCH_SECONDS, [running.pid, *process.pids])
        return code if code >= 0 else SIGNALLED - code
    finally:
        _end_group(running)


def _end_group(command: subprocess.Popen) -> None:
    """Ends a command and what it has started."""
    until = time.monotonic() + COMMAND_SECONDS
    with contextlib.suppress(ProcessLookupError):  # once nobody of the group is left
        os.killpg(command.pid, signal.SIGTERM)
        while time.monotonic() < until:
            command.poll()
            os.killpg(command.pid, 0)
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGKILL)
    command.wait()


def main(
    repository: Annotated[Path, typer.Option(help="Model repository to serve.")] = Path(
        "model_repository"
    ),
    triton_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- TRITON_FLAG]...", help="Flags for Triton.")
    ] = None,
    config_name: Annotated[
        str | None, typer.Option(help="Take configs/NAME.pbtxt where a model has it.")
    ] = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics.")] = 8002,
    health_port: Annotated[
        int | None, typer.Option(help="Port of /live and /ready, which know of the drain.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time that live requests have to end after SIGTERM.")
    ] = 30.0,
    heartbeat_timeout: Annotated[
        float, typer.Option(min=2, help="Seconds without a sign of life until the server's end.")
    ] = 60.0,
    ready_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that the server may take to start.")
    ] = 600.0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start again when the server ends by itself.")
    ] = False,
    then: Annotated[
        str | None,
        typer.Option(help="Run this shell command once ready, then stop; a port of 0 is chosen."),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the files with MANIFEST.json.")
    ] = False,
    expose_networks: Annotated[
        bool, typer.Option("--expose-networks", help="Let clients call unet and the others.")
    ] = False,
    runtime: Annotated[
        Runtime | None,
        typer.Option(
            help="Where the networks run, in place of what the engine's config.pbtxt says."
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure-development-server",
            help="Let the server of the pip package listen on other addresses than loopback.",
        ),
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="Log as text, or JSON lines.")] = "text",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the server's whole log, not only problems.")
    ] = False,
) -> None:
    """Serves a model repository until Ctrl-C."""
    log, health = Log(log_format), Health()
    log.take_tracebacks()
    allow_many_files()
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = Signals(number for number in ENDING if not (nohup and number == signal.SIGHUP))
    starts_left = STARTS
    try:
        options = ServerOptions(
            repository, config_name, address,
            *chosen_ports(address, http_port, grpc_port, metrics_port),
            ready_timeout=ready_timeout, heartbeat_timeout=heartbeat_timeout, verbose=verbose,
            insecure=insecure, expose_networks=expose_networks, runtime=runtime,
            flags=tuple(triton_flags or ()),
        )  # fmt: skip
        _check(options, verify=not no_verify)
        if health_port is not None:
            _serve_health(health, options, health_port)
        while True:
            try:
                serve(options, log, health, signals, drain_seconds, then)
            except ServerError as error:
                health.state = "restarting"
                log.complain(str(error))
                starts_left = starts_left - 1 if error.passing else STARTS
                again = starts_left > 0 if error.passing else restart and error.worth_another_try
                if not again:
                    raise typer.Exit(1) from None
                log.say("starting again")
                signals.wait(RESTART_PAUSE)
    except (NoTriton, ServerError, manifest.ManifestError) as error:
        log.complain(str(error))
        raise typer.Exit(1) from None
    except Stopped as stopped:
        signals.ignore()
        if then is None:
            log.say("stopped")
            raise typer.Exit from None
        raise typer.Exit(stopped.exit_code) from None


def _serve_health(health: Health, options: ServerOptions, port: int) -> None:
    names = ("http_port", "grpc_port", "metrics_port")
    ports = {"--" + name.replace("_", "-"): getattr(options, name) for name in names}
    check_ports(options.address, ports | {"--health-port": port})
    health.serve(options.address, port)


def _check(options: ServerOptions, verify: bool) -> None:
    """Holds the repository against its manifest and, with plans, against this machine."""
    if verify:
        manifest.verify(options.repository)
    if options.config_name == plans.CONFIG_NAME:
        plans.check_plans(options.repository, plans.this_machine())


if __name__ == "__main__":
    typer.run(main)
