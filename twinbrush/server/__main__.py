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
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from twinbrush.server import manifest, plans
from twinbrush.server.install import NoTriton, find_triton
from twinbrush.server.process import ServerError, ServerOptions, TritonProcess

POLL_SECONDS = 0.25
STARTS = 3  # tries, where a stub gives up without a reason while the server starts
RESTART_PAUSE = 2.0  # seconds between the end of a server and the start of the next
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALLED = 128  # a shell's exit code for a signal is that much more
COMMAND_SECONDS = 5.0  # that a command has to end when it is told to

_signals: list[int] = []  # of `ENDING` that have come


class Stopped(Exception):
    """A signal asked this process to end, or its command has ended."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


def serve(options: ServerOptions, then: str | None = None) -> None:
    """Runs one server until it is told to stop or something it depends on dies.

    With `then`, a shell command, the server lives as long as that command.

    Raises:
        ServerError: it could not start, or it ended by itself; the message says why.
        Stopped: it was told to stop, or the command has ended.
    """
    triton = find_triton()
    say(f"using {triton.description}")
    with TritonProcess(triton, options) as process:
        while not process.ready():
            process.check()
            pause(POLL_SECONDS)
        say(f"ready in {process.age:.1f} s, serving {options.repository}")
        if then is not None:
            raise Stopped(_run(then, process, f"{options.address}:{options.grpc_port}"))
        say(f"  gRPC    {options.address}:{options.grpc_port}")
        say(f"  HTTP    http://{options.address}:{options.http_port}")
        say(f"  metrics http://{options.address}:{options.metrics_port}/metrics")
        while True:
            process.check()
            pause(POLL_SECONDS)


def _run(command: str, process: TritonProcess, address: str) -> int:
    """Runs a shell command while the server lives; gives its exit code."""
    host = address.rpartition(":")[0]
    environment = os.environ | {"TWINBRUSH_SERVER": address, "no_grpc_proxy": host}
    running = subprocess.Popen(command, shell=True, env=environment, start_new_session=True)
    try:
        while (code := running.poll()) is None:
            process.check()
            pause(POLL_SECONDS)
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


def pause(seconds: float) -> None:
    """Waits.

    Raises:
        Stopped: a signal has come; only here, so that it cannot cut a clean-up short.
    """
    time.sleep(seconds)
    if _signals:
        raise Stopped(SIGNALLED + _signals[0])


def say(text: str) -> None:
    print(f"twinbrush: {text}", flush=True)


def main(
    repository: Annotated[Path, typer.Option(help="Model repository to serve.")] = Path(
        "model_repository"
    ),
    config_name: Annotated[
        str | None, typer.Option(help="Take configs/NAME.pbtxt where a model has it.")
    ] = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics.")] = 8002,
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
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the server's whole log, not only problems.")
    ] = False,
) -> None:
    """Serves a model repository until Ctrl-C."""
    options = ServerOptions(
        repository, config_name, address, *chosen_ports(http_port, grpc_port, metrics_port),
        verbose=verbose,
    )  # fmt: skip
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, lambda number, frame: _signals.append(number))
    starts_left = STARTS
    try:
        _check(options, verify=not no_verify)
        while True:
            try:
                serve(options, then)
            except NoTriton as error:
                print(f"twinbrush: {error}", file=sys.stderr)
                raise typer.Exit(1) from None
            except ServerError as error:
                print(f"twinbrush: {error}", file=sys.stderr, flush=True)
                starts_left = starts_left - 1 if error.passing else STARTS
                again = starts_left > 0 if error.passing else restart and error.worth_another_try
                if not again:
                    raise typer.Exit(1) from None
                say("starting again")
                pause(RESTART_PAUSE)
    except manifest.ManifestError as error:
        print(f"twinbrush: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except Stopped as stopped:
        if then is None:
            say("stopped")
            raise typer.Exit from None
        raise typer.Exit(stopped.exit_code) from None


def _check(options: ServerOptions, verify: bool) -> None:
    """Holds the repository against its manifest and, with plans, against this machine."""
    if verify:
        manifest.verify(options.repository)
    if options.config_name == plans.CONFIG_NAME:
        plans.check_plans(options.repository, plans.this_machine())


def chosen_ports(*ports: int) -> list[int]:
    """The ports, each 0 replaced by one that is free."""
    probes = [socket.socket() for _ in ports]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [p or probe.getsockname()[1] for p, probe in zip(ports, probes, strict=True)]
    finally:
        for probe in probes:
            probe.close()


if __name__ == "__main__":
    typer.run(main)
