"""Deterministic requests give the same bytes, alone and in a crowd.

`python tests/test_reproducible.py REPOSITORY` prints the hashes of the same 50 requests, to compare
two states of the code on one machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
from pathlib import Path

import numpy as np

from twinbrush.engine.config import ENGINE
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, Event, Finished
from twinbrush.engine.request import GenerationRequest
from twinbrush.runtimes.onnx_runtime import LocalModels, read_config

COUNT = 50
SAMPLERS = ("ddim", "euler", "lcm", "dpmpp_2m")


def mixed_requests(engine: Engine) -> list[GenerationRequest]:
    """Requests that differ in every field, from fixed seeds."""
    rng = random.Random(7)
    native, grid = engine.config.native_side, engine.config.side_multiple
    requests = []
    for k in range(COUNT):
        shape = rng.choice(["star", "ring", "square"])
        fields = {
            "prompt": np.array([f"a {shape} left of circle {k % 5}".encode()], object),
            "negative_prompt": np.array([b"a cross" if k % 3 == 0 else b""], object),
            "seed": np.array([k]),
            "steps": np.array([rng.randint(1, 8)]),
            "sampler": np.array([SAMPLERS[k % 4].encode()], object),
            "guidance_scale": np.array([rng.uniform(1.1, 6)]),
            "width": np.array([native + grid * rng.randint(0, 2)]),
            "height": np.array([native + grid * rng.randint(0, 1)]),
            "num_images": np.array([1 + k % 2]),
            "image_format": np.array([b"raw" if k % 2 else b"png"], object),
            "deterministic": np.array([True]),
        }
        requests.append(GenerationRequest.parse(fields, engine.config))
    return requests


def hashes(engine: Engine, requests: list[GenerationRequest], at_once: bool) -> list[list[str]]:
    """SHA-256 of every image by request; all requests live at once, or one after the other."""
    found: list[dict[int, str]] = [{} for _ in requests]
    ended = [threading.Event() for _ in requests]

    def submit(k: int) -> None:
        def reply(event: Event) -> None:
            if isinstance(event, Finished):
                found[k][event.index] = hashlib.sha256(event.image).hexdigest()
            elif isinstance(event, End):
                if event.error:
                    found[k][-1] = str(event.error)
                ended[k].set()

        engine.submit(requests[k], reply)

    for k in range(len(requests)):
        submit(k)
        if not at_once:
            assert ended[k].wait(120)
    assert all(event.wait(120) for event in ended)
    return [[images[index] for index in sorted(images)] for images in found]


def test_fifty_mixed_requests_give_the_same_bytes_alone_and_at_once(engine):
    requests = mixed_requests(engine)
    alone = hashes(engine, requests, at_once=False)
    assert [len(images) for images in alone] == [request.num_images for request in requests]
    assert len({h for images in alone for h in images}) == sum(map(len, alone))
    assert hashes(engine, requests, at_once=True) == alone


def main() -> None:
    repository = Path(sys.argv[1])
    config = read_config(repository / ENGINE.parent / "config.pbtxt")
    engine = Engine.of_model(repository / ENGINE, config, LocalModels(repository))
    print(json.dumps(hashes(engine, mixed_requests(engine), at_once=False)))
    engine.close()


if __name__ == "__main__":
    main()
