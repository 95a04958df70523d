"""Finished latents become pictures and files: the decoder in chunks, then a pool of encoders."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from twinbrush.engine import images
from twinbrush.engine.batcher import CallKey, Claim
from twinbrush.engine.config import PipelineConfig
from twinbrush.engine.denoise import Painting
from twinbrush.engine.generation import Generation
from twinbrush.engine.models import Models
from twinbrush.engine.tracing import Marks

DECODER = "vqgan_decoder"
IMAGE_ENCODERS = 2  # threads that write PNG and JPEG
# Of pictures that may wait for an image encoder; more hold the decoder back.
WAITING_NUMBERS = 32 * 512 * 512


@dataclass(eq=False)
class LiveImage:
    """One image of a request while it is made."""

    generation: Generation
    index: int
    painting: Painting
    claim: Claim
    marks: Marks


class Decoder:
    """Decodes images that are put in, in calls of few, and encodes them to files.

    Args:
        models: the served networks.
        turn: is held while the decoder runs.
        config: the checkpoint.
        pictures: that a call of a key may have.
        finish: takes an image and the bytes of its file, from any thread.
        fail: takes the requests that the exception being handled ends, the stage, and what the
            client may know of the reason.
    """

    def __init__(
        self,
        models: Models,
        turn: Callable[[], AbstractContextManager[None]],
        config: PipelineConfig,
        pictures: Callable[[CallKey], int],
        finish: Callable[[LiveImage, bytes], None],
        fail: Callable[..., None],
    ):
        self._models, self._turn, self._config, self._pictures = models, turn, config, pictures
        self._finish, self._fail = finish, fail
        self._waiting: queue.SimpleQueue[LiveImage | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(IMAGE_ENCODERS, "image-encoder")
        self._numbers = 0  # of pictures that are decoded, and not encoded yet
        self._encoded = threading.Condition()

    def put(self, image: LiveImage) -> None:
        self._waiting.put(image)

    def close(self) -> None:
        """Ends the loop; images that were put in before are finished."""
        self._waiting.put(None)

    def loop(self) -> None:
        """Decodes until `close`. For one thread."""
        for batch in batches(self._waiting):
            groups: dict[CallKey, list[LiveImage]] = {}
            for image in batch:
                groups.setdefault(image.claim.key, []).append(image)
            for key, group in groups.items():
                most = 1 if key.alone else self._pictures(key)
                for i in range(0, len(group), most):
                    self._decode(group[i : i + most])
        self._encoders.shutdown()

    def _decode(self, group: Sequence[LiveImage]) -> None:
        group = [image for image in group if not image.generation.ended]
        if not group:
            return
        try:
            latent = np.stack([image.painting.latent.x for image in group])
            with self._turn():
                outputs = self._models.run(DECODER, {"latent": latent})
            # Files of earlier exports end in the picture itself.
            pictures = outputs["pixels"] if "pixels" in outputs else outputs["image"]
            magnitudes = outputs.get("mean_magnitude", np.zeros(len(group)))
        except Exception:
            self._fail([image.generation for image in group], "decoding")
            return
        for image, picture, magnitude in zip(group, pictures, magnitudes, strict=True):
            image.marks.decoded = time.monotonic()
            with self._encoded:
                self._encoded.wait_for(lambda: self._numbers < WAITING_NUMBERS)
                self._numbers += picture.size
            self._encoders.submit(self._encode, image, picture, float(magnitude))

    def _encode(self, image: LiveImage, picture: np.ndarray, magnitude: float) -> None:
        try:
            if not image.generation.ended:
                self._write(image, picture, magnitude)
        except Exception:
            self._fail([image.generation], "encoding the image")
        finally:
            with self._encoded:
                self._numbers -= picture.size
                self._encoded.notify()

    def _write(self, image: LiveImage, picture: np.ndarray, magnitude: float) -> None:
        request = image.generation.request
        try:
            images.check_finite(magnitude)
            pixels = picture if picture.dtype == np.uint8 else images.to_pixels(picture)
        except ValueError as error:
            self._fail([image.generation], "decoding", str(error))
            return
        metadata = request.metadata_of(image.index, self._config)
        data = images.encode(pixels, request.image_format, metadata, request.image_quality)
        self._finish(image, data)


def batches(waiting: queue.SimpleQueue) -> Iterator[list]:
    """Everything that waits, each time that something does, until None comes."""
    while True:
        batch = [waiting.get()]
        while not waiting.empty():
            batch.append(waiting.get())
        yield [item for item in batch if item is not None]
        if None in batch:
            return
