"""The served networks as the engine sees them, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Models(Protocol):
    """Runs a network by name. Implementations: Triton BLS, and ONNX Runtime in this process."""

    def run(self, model: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Runs one batch and blocks until it is done.

        Args:
            model: name of the served model.
            inputs: its input tensors by name; the batch is the first axis of each. An array that
                is not writeable never changes: the runtime may keep it where the model runs, for
                later calls with the same array.

        Returns:
            Every output tensor by name.

        Raises:
            Exception: the model failed; the message is for the log, not for clients.
        """
        ...


class PlacedModels(Models, Protocol):
    """Networks that know where they run.

    Attributes:
        on_accelerator: whether one accelerator runs them all, and calls reach it directly.
    """

    @property
    def on_accelerator(self) -> bool: ...
