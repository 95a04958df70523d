"""Networks that wait as long as an accelerator would compute, so that the rest is the host's time.

Tensors have the shapes of Stable Diffusion 1.5. One lock, a file, stands for the accelerator: it
holds in the processes of served networks as in one. Knows nothing of the engine.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twinbrush.engine.images import to_pixels

FOLDER = "TWINBRUSH_WAITING"  # environment variable: the folder of the lock and of the counts
SIDE, TOKENS, WIDTH, LEVELS = 512, 77, 768, 2
PICTURES = 8  # different ones that the decoder gives
STEEPNESS = 1.4  # of the amplitudes over the frequency


@dataclass(frozen=True)
class Wait:
    """What a call takes on an H200 at half of its peak, in seconds."""

    call: float
    row: float = 0.0

    def seconds(self, rows: float) -> float:
        return self.call + self.row * rows


WAITS = {
    "clip_text": Wait(0.003),
    "bert": Wait(0.003),
    "fusion": Wait(0.001),
    "unet": Wait(0.002, 0.0017),
    "vqgan_decoder": Wait(0.002, 0.0053),
}
MODELS = tuple(WAITS)


@dataclass(frozen=True)
class Count:
    """Calls of a network, their rows, and the seconds that they held the accelerator."""

    calls: float
    rows: float
    seconds: float

    def __sub__(self, other: Count) -> Count:
        return Count(self.calls - other.calls, self.rows - other.rows, self.seconds - other.seconds)


class Accelerator:
    """The lock, and counts of what held it, in files that all processes share.

    Args:
        folder: it exists.
    """

    def __init__(self, folder: Path):
        self._lock = folder / "lock"
        self._lock.touch()
        counts = os.open(folder / "counts", os.O_RDWR | os.O_CREAT)
        os.ftruncate(counts, mmap.PAGESIZE)
        self._counts = np.frombuffer(mmap.mmap(counts, mmap.PAGESIZE), np.float64)
        os.close(counts)

    def hold(self, model: str, rows: int) -> None:
        """Waits for the accelerator, and then as long as a call of that many rows takes."""
        lock = os.open(self._lock, os.O_RDWR)  # one of this thread's own
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            started = time.perf_counter()
            time.sleep(WAITS[model].seconds(rows))
            first = 3 * MODELS.index(model)
            self._counts[first : first + 3] += 1, rows, time.perf_counter() - started
        finally:
            os.close(lock)

    def counts(self) -> dict[str, Count]:
        """Since the folder was made."""
        rows = self._counts[: 3 * len(MODELS)].reshape(-1, 3).tolist()
        return {model: Count(*row) for model, row in zip(MODELS, rows, strict=True)}


class WaitingModels:
    """`Models` that wait in this process; what they give is made once."""

    on_accelerator = True

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        rng = np.random.default_rng(0)
        self._made: dict[str, Mapping[str, np.ndarray]] = {
            "clip_text": {"clip_tokens": _noise(rng, 64, TOKENS, WIDTH)},
            "bert": {"bert_tokens": _noise(rng, 64, LEVELS, TOKENS, WIDTH)},
            "fusion": {"encoder_hidden_states": _noise(rng, 64, TOKENS, WIDTH)},
            "unet": {"model_output": _noise(rng, 64, 4, SIDE // 8, SIDE // 8)},
            "vqgan_decoder": {
                "pixels": np.stack([to_pixels(picture) for picture in photographs(PICTURES)]),
                "mean_magnitude": np.ones(PICTURES, np.float32),
            },
        }

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Models.run`."""
        rows = len(next(iter(inputs.values())))
        self._accelerator.hold(model, rows)
        return {name: made[:rows] for name, made in self._made[model].items()}


def _noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def photographs(count: int) -> np.ndarray:
    """Noise with a spectrum that falls as photographs' does: (count, 3, 512, 512) in [-1, 1].

    Its files are as large as those of photographs. The channels share most of their luminance.
    """
    rng = np.random.default_rng(1)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1
    made = []
    for _ in range(count):
        grey, *tints = (_spectral(rng, frequency) for _ in range(4))
        made.append([grey + 0.3 * tint for tint in tints])
    pictures = np.array(made, np.float32)
    return np.clip(pictures / (3 * pictures.std()), -1, 1)


def _spectral(rng: np.random.Generator, frequency: np.ndarray) -> np.ndarray:
    phases = np.exp(2j * np.pi * rng.random(frequency.shape))
    plane = np.fft.irfft2(phases / frequency**STEEPNESS, (SIDE, SIDE))
    return plane / plane.std()


def waiting_models() -> WaitingModels:
    """Those of the folder that the environment names."""
    return WaitingModels(Accelerator(Path(os.environ[FOLDER])))


class ServedNetwork:
    """A Python model of Triton that is one of the networks."""

    def initialize(self, args: dict[str, str]) -> None:
        self._name = args["model_name"]
        self._models = waiting_models()

    def execute(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

        answers = []
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            outputs = self._models.run(self._name, inputs)
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
