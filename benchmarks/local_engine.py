"""The serving engine in this process, over the files and settings of a model repository."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from twinbrush.engine.config import ENGINE
from twinbrush.engine.denoise import Models
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, Event, Finished
from twinbrush.engine.request import GenerationRequest
from twinbrush.runtimes.onnx_runtime import read_config

console = Console()


@contextmanager
def local_engine(repository: Path, models: Models) -> Iterator[Engine]:
    """An engine that is closed on leaving.

    Ends the command with a sentence where the repository is not exported.
    """
    try:
        config = read_config(repository / ENGINE.parent / "config.pbtxt")
        engine = Engine.of_model(repository / ENGINE, config, models)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --repository: {error}")
    try:
        yield engine
    finally:
        engine.close()


def paint(engine: Engine, prompts: list[str], **fields: np.ndarray) -> list[np.ndarray]:
    """Pictures (H, W, 3) uint8 of the prompts, all requests at once.

    Raises:
        RuntimeError: a request ended in an error.
    """
    pictures: dict[int, np.ndarray] = {}
    errors: list[str] = []
    places = threading.Semaphore(64)

    def replier(k: int, side: tuple[int, int]) -> Callable[[Event], None]:
        def reply(event: Event) -> None:
            if isinstance(event, Finished):
                pictures[k] = np.frombuffer(event.image, np.uint8).reshape(*side, 3)
            elif isinstance(event, End):
                if event.error:
                    errors.append(str(event.error))
                places.release()

        return reply

    for k, prompt in enumerate(track(prompts, "painting", console=console, transient=True)):
        given = {
            "prompt": np.array([prompt.encode()], object),
            "seed": np.array([k]),
            "image_format": np.array([b"raw"], object),
            "progress": np.array([False]),
        }
        request = GenerationRequest.parse(given | fields, engine.config)
        places.acquire()
        engine.submit(request, replier(k, (request.height, request.width)))
    for _ in range(64):
        places.acquire()
    if errors:
        raise RuntimeError(errors[0])
    return [pictures[k] for k in range(len(prompts))]
