"""Processes that die or hang: how soon clients know, and how soon the server is back."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.crowd import crowd
from benchmarks.faults.serving import Serving, serving

CLIENTS = 8
CALL_SECONDS = 3  # that a model call may take, in the trial of a network that hangs


def stub_killed(repository: Path, rounds: int = 3) -> dict:
    """The engine's stub is killed under load."""
    with serving(repository) as server:
        return _rounds(server, lambda: _kill(server.stub("text_to_image_stream")), rounds)


def server_killed(repository: Path, rounds: int = 2) -> dict:
    """The Triton server is killed under load."""
    with serving(repository) as server:
        return _rounds(server, lambda: _kill(server.server), rounds)


def hung_network(repository: Path, rounds: int = 2) -> dict:
    """The UNet's process stops answering, as a hung device does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(repository, Path(folder) / "repository"))
        config = copy / "text_to_image_stream" / "config.pbtxt"
        key = 'key: "call_seconds" value: { string_value: '
        text = config.read_text()
        before, _, after = text.partition(key)
        config.write_text(f'{before}{key}"{CALL_SECONDS}"{after[after.index(" }") :]}')
        with serving(copy, "--no-verify") as server:
            seen = _rounds(server, lambda: _stop(server.stub("unet")), rounds)
    return seen | {"limit_seconds": CALL_SECONDS}


def _kill(pid: int | None) -> None:
    assert pid is not None, "there is no such process"
    os.kill(pid, signal.SIGKILL)


def _stop(pid: int | None) -> None:
    assert pid is not None, "the UNet runs in no process of its own"
    os.kill(pid, signal.SIGSTOP)


def _rounds(server: Serving, fault: Callable[[], None], rounds: int) -> dict:
    noticed, recovered, unanswered, failed = [], [], 0, 0
    for number in range(rounds):
        with crowd(server, CLIENTS, pause=0.05) as seen:
            time.sleep(2.0)
            moment = time.monotonic()
            fault()
            server.wait_until_ready(number + 2)
            time.sleep(3.0)
        after = seen.since(moment)
        errors = [o for o in after if o.error]
        last_error = max(o.answered for o in errors)
        noticed.append(min(o.answered for o in errors) - moment)
        recovered.append(min(o.answered for o in after if not o.error and o.sent > last_error)
                         - moment)  # fmt: skip
        failed += sum(o.sent <= moment for o in errors)
        unanswered += seen.unanswered()
    return {
        "rounds": rounds,
        "clients": CLIENTS,
        "seconds_to_notice": round(statistics.median(noticed), 2),
        "seconds_to_recover": round(statistics.median(recovered), 2),
        "live_requests_that_failed": failed,
        "requests_without_an_answer": unanswered,
    }
