"""Paints prompts with the serving engine, in this process. Knows not what a picture shows."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.progress import track

from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, Event, Finished
from twinbrush.engine.request import GenerationRequest

LIVE = 64  # requests that the engine holds at a time
console = Console()


def paint(engine: Engine, prompts: list[str], **fields: np.ndarray) -> list[np.ndarray]:
    """Paints picture k of prompt k from seed k, all requests at once.

    Args:
        fields: request fields, the same for every prompt.

    Returns:
        Pictures (H, W, 3) uint8, in the order of the prompts.

    Raises:
        RuntimeError: a request ended in an error.
    """
    pictures: dict[int, np.ndarray] = {}
    errors: list[str] = []
    places = threading.Semaphore(LIVE)

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
    for _ in range(LIVE):
        places.acquire()
    if errors:
        raise RuntimeError(errors[0])
    return [pictures[k] for k in range(len(prompts))]
