"""Many images with cancels, disconnects and bad requests among them: what grows."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.serving import HOST, Serving, serving
from twinbrush_client import InvalidRequest

CLIENTS = 12
KINDS = ("image", "cancel", "disconnect", "bad")
WEIGHTS = (85, 5, 5, 5)


def soak(repository: Path, images: int = 10_000) -> dict:
    """Slopes are least squares over the second half, in MB per 1,000 images."""
    with serving(repository) as server:
        counts = dict.fromkeys(KINDS, 0)
        lock, stopping, samples = threading.Lock(), threading.Event(), []

        def run(number: int) -> None:
            rng = random.Random(number)
            while not stopping.is_set():
                kind = rng.choices(KINDS, WEIGHTS)[0]
                _one(server, kind, rng)
                with lock:
                    counts[kind] += 1

        threads = [threading.Thread(target=run, args=[k], daemon=True) for k in range(CLIENTS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while counts["image"] < images:
            time.sleep(1.0)
            samples.append((counts["image"], server.resources()))
        stopping.set()
        for thread in threads:
            thread.join(60)
        took = time.monotonic() - began
        time.sleep(3.0)
        settled = server.resources()
    return {"seconds": round(took), "requests": counts} | _growth(samples, settled)


def _one(server: Serving, kind: str, rng: random.Random) -> None:
    fields: dict[str, Any] = {
        "steps": rng.choice((1, 1, 2)),
        "width": rng.choice((16, 32, 48)),
        "height": rng.choice((16, 32, 48)),
        "seed": rng.randrange(1000),
    }
    prompt = f"a red circle {rng.randrange(50)}"
    if kind == "disconnect":
        _leave(server, fields | {"prompt": prompt, "steps": 50})
        return
    if kind != "image":
        fields["steps"] = 0 if kind == "bad" else 50
    with server.client() as client:  # a connection of its own: each request connects anew
        if kind == "cancel":
            for _ in client.stream(prompt, **fields):
                return
        with suppress(InvalidRequest):
            client.generate(prompt, **fields)


def _leave(server: Serving, fields: dict[str, Any]) -> None:
    """Closes the socket in the middle of a stream over HTTP."""
    connection = http.client.HTTPConnection(HOST, server.http, timeout=60)
    path = "/v2/models/text_to_image_stream/generate_stream"
    connection.request("POST", path, json.dumps(fields))
    connection.getresponse().read(10)
    connection.close()


def _growth(samples: list[tuple[int, dict]], settled: dict) -> dict:
    half = samples[len(samples) // 2 :]
    x = np.array([count for count, _ in half]) / 1000

    def slope(name: str) -> float:
        return round(float(np.polyfit(x, [sample[name] for _, sample in half], 1)[0]), 3)

    first = samples[len(samples) // 4][1]
    return {
        "rss_mb_per_1000_images": slope("rss_mb"),
        "shm_mb_per_1000_images": slope("shm_mb"),
        "threads_gained": int(settled["threads"] - first["threads"]),
        "descriptors_gained": int(settled["descriptors"] - first["descriptors"]),
        "rss_mb": round(settled["rss_mb"]),
        "rss_mb_at_a_quarter": round(first["rss_mb"]),
    }
