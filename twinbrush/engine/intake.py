"""Requests become images that wait for UNet calls: newcomers gather, are encoded, and join.

What needs no network is made before: token ids, and the first noise. Knows no batcher.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from twinbrush.engine.conditioning import Conditioner
from twinbrush.engine.decode import LiveImage
from twinbrush.engine.denoise import Painting
from twinbrush.engine.generation import EngineError, Generation
from twinbrush.engine.newcomers import arrived, gathered
from twinbrush.engine.plan import Planner
from twinbrush.engine.request_ids import named
from twinbrush.engine.tracing import Marks
from twinbrush.engine.turns import NoTurns, Stage, Turns

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Newcomer:
    """A request before it is encoded.

    Attributes:
        paintings: of its images, without conditioning.
        needs_networks: whether its conditioning is not in the cache.
    """

    generation: Generation
    paintings: Sequence[Painting]
    needs_networks: bool


class Intake:
    """Encodes requests that are put in, in calls of many where that saves time.

    Args:
        plan: of the checkpoint.
        conditioner: runs the encoders.
        turns: on the device.
        max_rows: requests that may share an encoder call.
        draw: begins to draw the first noise of paintings.
        others: takes a number of newcomers; gives that of the requests that are being made beside.
        add: takes images that wait for a UNet call from now on.
        fail: takes the requests that the exception being handled ends, and the stage.
    """

    def __init__(
        self,
        plan: Planner,
        conditioner: Conditioner,
        turns: Turns | NoTurns,
        max_rows: int,
        draw: Callable[[Sequence[Painting]], Future],
        others: Callable[[int], int],
        add: Callable[[Sequence[LiveImage]], None],
        fail: Callable[..., None],
    ):
        self._plan, self._conditioner, self._turns = plan, conditioner, turns
        self._max_rows, self._draw, self._others = max_rows, draw, others
        self._add, self._fail = add, fail
        self._waiting: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
        self._joined = threading.Event()  # not set while newcomers are encoded, but not added yet
        self._joined.set()

    def put(self, generation: Generation) -> None:
        self._waiting.put(generation)

    def close(self) -> None:
        """Ends the loop."""
        self._waiting.put(None)

    def wait_for_encoded(self, seconds: float) -> None:
        """Waits until all requests that the encoders are done with are added, at most so long."""
        self._joined.wait(seconds)

    def loop(self) -> None:
        """Encodes until `close`. For one thread."""
        for batch in gathered(self._waiting, self._patience):
            newcomers = self._newcomers(batch)
            if not any(newcomer.needs_networks for newcomer in newcomers):
                self.encode(newcomers)
                continue
            with ExitStack() as turn:
                turn.enter_context(self._turns.take(Stage.ENCODE))
                late = arrived(self._waiting, self._max_rows - len(newcomers))
                self.encode([*newcomers, *self._newcomers(late)], partial(self._pass_on, turn))
            self._joined.set()

    def encode(
        self, newcomers: Sequence[Newcomer], networks_done: Callable[[], None] = lambda: None
    ) -> None:
        """Encodes newcomers and adds their images; only those that fail alone are at fault."""
        generations, began = [newcomer.generation for newcomer in newcomers], time.monotonic()
        try:
            texts = [self._plan.texts(generation.request) for generation in generations]
            encoded = self._conditioner(texts, networks_done)
            now = time.monotonic()
            made = [
                LiveImage(
                    newcomer.generation, index, painting,
                    self._plan.claim(newcomer.generation.request, painting),
                    Marks(newcomer.generation.submitted, began, now),
                )
                for newcomer, tensors in zip(newcomers, encoded, strict=True)
                for index, painting in enumerate(self._conditioned(newcomer, tensors))
            ]  # fmt: skip
            self._drawing.result()
        except Exception as error:
            if len(generations) > 1 and not isinstance(error, EngineError):
                log.warning(
                    "encoding %d prompts at once failed: %s", len(generations),
                    named(generation.request_id for generation in generations), exc_info=True,
                )  # fmt: skip
                for newcomer in newcomers:
                    if not newcomer.generation.ended:
                        self.encode([newcomer])
            else:
                self._fail(generations, "encoding the prompt")
            return
        self._add(made)

    def _newcomers(self, generations: Iterable[Generation]) -> list[Newcomer]:
        """What of requests needs no network; their first noise is on its way."""
        made = []
        for generation in generations:
            if not generation.ended:
                try:
                    request = generation.request
                    needs_networks = self._conditioner.prepare(self._plan.texts(request))
                    paintings = self._plan.paintings(request)
                    made.append(Newcomer(generation, paintings, needs_networks))
                except Exception:
                    self._fail([generation], "encoding the prompt")
        self._drawing = self._draw([p for newcomer in made for p in newcomer.paintings])
        return made

    def _patience(self, newcomers: list[Generation]) -> float:
        """Seconds that newcomers may go on waiting for others to share an encoder call with."""
        texts = self._plan.texts(newcomers[-1].request)
        if len(newcomers) >= self._max_rows or not self._conditioner.needs_call(texts):
            return 0.0
        others = self._others(len(newcomers))
        now, gathering = time.monotonic(), self._conditioner.gathering
        patience = gathering.patience([now - g.submitted for g in newcomers], others)
        return min(patience, gathering.saved)  # looks again, since others end meanwhile

    def _conditioned(
        self, newcomer: Newcomer, encoded: Mapping[str, np.ndarray]
    ) -> Sequence[Painting]:
        conditioning = self._plan.conditioning(newcomer.generation.request, encoded)
        for painting in newcomer.paintings:
            painting.conditioning = conditioning
        return newcomer.paintings

    def _pass_on(self, turn: ExitStack) -> None:
        """Ends the encoders' turn; the newcomers will soon wait for a UNet call."""
        self._joined.clear()
        turn.close()
