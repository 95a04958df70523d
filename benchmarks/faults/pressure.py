"""Cancels, overload, drain, a reader that does not read: what the other clients feel."""

from __future__ import annotations

import queue
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc as plain_grpc
import numpy as np
import tritonclient.grpc as grpc
from tritonclient.grpc import service_pb2_grpc

from benchmarks.faults.crowd import Crowd, Outcome, ask, crowd
from benchmarks.faults.serving import Serving, serving
from benchmarks.local_engine import local_engine
from benchmarks.starvation import measure, rare_sizes, summarise
from twinbrush.runtimes.onnx_runtime import LocalModels
from twinbrush_client import wire
from twinbrush_client.errors import error_of

STREAM = "text_to_image_stream"
FULL = "RESOURCE_EXHAUSTED"  # of a refusal because of load


# Cancels ----------------------------------------------------------------------------------------


def cancel(repository: Path, rounds: int = 40) -> dict:
    """Clients leave a stream of 50 steps after its first step, or name it in a `cancel`."""
    with serving(repository) as server:
        left = [_one_cancel(server, by_id=False) for _ in range(rounds)]
        named = [_one_cancel(server, by_id=True) for _ in range(rounds)]
    return {"rounds": rounds, "stream_left": _cancels(left), "cancel_request": _cancels(named)}


def _one_cancel(server: Serving, by_id: bool) -> tuple[float, int]:
    """Milliseconds until no request lives, and UNet calls that began after the cancel."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    fields = wire.inputs({"prompt": "a red circle", "steps": 50, "num_images": 8})
    with (
        grpc.InferenceServerClient(server.address) as client,
        grpc.InferenceServerClient(server.address) as other,
    ):
        other.start_stream(lambda result, error: None)  # a connection that stands already
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(STREAM, fields, request_id="leaving")
        answers.get(timeout=30)
        calls, began = server.unet_calls(), time.monotonic()
        if by_id:
            target = grpc.InferInput("cancel", [1], "BYTES")
            target.set_data_from_numpy(np.array([b"leaving"], object))
            other.async_stream_infer(STREAM, [target])
            while answers.get(timeout=30) is None:
                pass
        else:
            client.stop_stream(cancel_requests=True)
        milliseconds = (time.monotonic() - began) * 1000
        last, quiet = calls, 0
        while quiet < 3:  # until the count stands still
            time.sleep(0.06)
            now = server.unet_calls()
            if now != last:
                milliseconds = max(milliseconds, (time.monotonic() - 0.06 - began) * 1000)
            quiet, last = (quiet + 1, now) if now == last else (0, now)
    return milliseconds, max(0, last - calls - 1)  # one was running


def _cancels(seen: list[tuple[float, int]]) -> dict:
    times, wasted = zip(*seen, strict=True)
    p50, p99 = np.percentile(times, (50, 99))
    return {
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "steps_wasted_p50": statistics.median(wasted),
        "steps_wasted_most": max(wasted),
    }


# Overload ---------------------------------------------------------------------------------------


def overload(repository: Path, turns: int = 3, seconds: float = 15.0) -> dict:
    """Requests arrive at random, at twice and five times what the server can do.

    What it can do is measured before and after each turn, because machines change their pace;
    shares are medians over the turns. The sender runs on the same cores, and takes `sender_cores`
    of them while requests arrive, which the server then lacks.
    """
    with serving(repository) as server:
        capacities, found = [_capacity(server)], []
        for _ in range(turns):
            points = {k: _arrivals(server, k * capacities[-1], seconds) for k in (2, 5)}
            capacities.append(_capacity(server))
            for point in points.values():
                capacity = statistics.mean(capacities[-2:])
                point["goodput_share"] = point["accepted_per_second"] / capacity
            found.append(points)
    return {
        "turns": turns,
        "capacity_per_second": round(statistics.median(capacities), 1),
        **{f"times_{k}": _over_turns([points[k] for points in found]) for k in (2, 5)},
    }


def _capacity(server: Serving, seconds: float = 6.0) -> float:
    """Images a second for 32 clients, each of which waits for its answer."""
    with crowd(server, 32) as seen:
        time.sleep(2.0)
        began = time.monotonic()
        time.sleep(seconds)
        return sum(o.error is None for o in seen.since(began)) / seconds


def _over_turns(points: list[dict]) -> dict:
    """Medians of rates, latencies and shares, sums of counts."""
    shares = sorted(round(point["goodput_share"], 3) for point in points)
    return {
        name: sum(values) if isinstance(values[0], int) else round(statistics.median(values), 3)
        for name in points[0]
        if (values := [point[name] for point in points])
    } | {"goodput_shares": shares}


def _arrivals(server: Serving, rate: float, seconds: float) -> dict:
    rng, seen, sent = random.Random(1), Crowd(), 0
    with grpc.InferenceServerClient(server.address) as client:
        began, used = time.monotonic(), time.process_time()
        due = began
        while (now := time.monotonic()) < began + seconds:
            if now < due:
                time.sleep(due - now)
            due += rng.expovariate(rate)
            _send(client, seen, sent)
            sent += 1
        stopped, used = time.monotonic(), time.process_time() - used
        while len(seen.outcomes) < sent and time.monotonic() < stopped + 60:
            time.sleep(0.05)
    accepted = [o for o in seen.outcomes if o.error is None]
    settled = [o for o in accepted if began + seconds / 5 <= o.answered <= stopped]
    refused = [o for o in seen.outcomes if o.error == FULL]
    if others := Counter(o.error for o in seen.outcomes if o.error not in (None, FULL)):
        print("other errors:", dict(others), file=sys.stderr)
    return {
        "sent_per_second": round(sent / (stopped - began), 1),
        "sender_cores": used / (stopped - began),
        "accepted_per_second": len(settled) / (stopped - began - seconds / 5),
        "accepted_p50_ms": seen.percentile_ms(50),
        "accepted_p99_ms": seen.percentile_ms(99),
        "refused": len(refused),
        "refused_with_retry_after": sum(o.retry_after is not None for o in refused),
        "other_errors": sum(others.values()),
        "requests_without_an_answer": sent - len(seen.outcomes),
    }


def _send(client: grpc.InferenceServerClient, seen: Crowd, number: int) -> None:
    fields = wire.inputs({"prompt": "a red circle", "seed": number, "image_format": "png"})
    sent = time.monotonic()

    def done(result, error) -> None:
        code = after = None
        if error is not None:
            known = error_of(str(error.status()).removeprefix("StatusCode."), error.message())
            code, after = known.code, known.retry_after
        seen.outcomes.append(Outcome(sent, time.monotonic(), code, after))

    client.async_infer("text_to_image", fields, done, client_timeout=120)


# Drain ------------------------------------------------------------------------------------------


def drain(repository: Path, clients: int = 16) -> dict:
    """SIGTERM under load: every request that was taken must be finished."""
    outcomes: list[Outcome] = []
    with serving(repository) as server, ExitStack() as stack:
        handles = [stack.enter_context(server.client()) for _ in range(clients)]

        def run(number: int) -> None:
            send = lambda: handles[number].generate(  # noqa: E731
                "a red circle", num_images=4, steps=12, seed=number
            )
            outcomes.append(ask(send))

        threads = [threading.Thread(target=run, args=[k]) for k in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        began = time.monotonic()
        live = clients - len(outcomes)
        server.launcher.send_signal(signal.SIGTERM)
        code = server.launcher.wait(60)
        took = time.monotonic() - began
        for thread in threads:
            thread.join(60)
    return {
        "live_at_the_signal": live,
        "lost": sum(outcome.error is not None for outcome in outcomes),
        "seconds": round(took, 1),
        "exit_code": code,
    }


# A reader that does not read ----------------------------------------------------------------------


def slow_reader(repository: Path, turns: int = 3, seconds: float = 8.0) -> dict:
    """Others beside streams that are never read, over others beside the same streams, read."""
    with serving(repository) as server:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(turns):
            for stuck in (False, True):
                with _stream_reader(server, stuck), crowd(server, 4) as seen:
                    time.sleep(1.0)
                    began = time.monotonic()
                    time.sleep(seconds)
                    times[stuck].append(seen.percentile_ms(99, began))
                    lost = seen.unanswered()
    ratios = [stuck / read for read, stuck in zip(times[False], times[True], strict=True)]
    return {
        "others_p99_ms_beside_a_reader": round(statistics.median(times[False]), 1),
        "others_p99_ms_beside_a_stuck_one": round(statistics.median(times[True]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "others_without_an_answer": lost,
    }


@contextmanager
def _stream_reader(server: Serving, stuck: bool):
    """A stream of four requests a second, 0.2 MB of pictures each, which are read or not."""
    options = [("grpc.max_receive_message_length", -1)]
    channel = plain_grpc.insecure_channel(server.address, options=options)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    ended = threading.Event()
    fields = {"steps": 2, "num_images": 4, "width": 128, "height": 128, "image_format": "raw"}

    def requests():
        while not ended.wait(0.25):
            yield wire.stream_request("a red circle", fields)

    answers = stub.ModelStreamInfer(requests())

    def read() -> None:
        with suppress(plain_grpc.RpcError):
            for _ in answers:
                pass

    if not stuck:
        threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        answers.cancel()
        channel.close()


# Starvation ---------------------------------------------------------------------------------------


def starvation(repository: Path, turns: int = 2, seconds: float = 5.0) -> dict:
    """16 clients of the native size beside 40 of other sizes, as `benchmarks.starvation`."""
    with local_engine(repository, LocalModels(repository)) as engine:
        side = engine.config.native_side
        native, odd = [(side, side)] * 16, rare_sizes(engine.config, 40)
        measure(engine, native, odd, 2.0)  # warm up
        alone = [measure(engine, native, [], seconds) for _ in range(turns)]
        beside = [measure(engine, native, odd, seconds) for _ in range(turns)]
    summary = summarise(alone, beside, 16 / 56)
    return {name: summary[name] for name in ("work_share_over_fair", "pace_over_fair")}
