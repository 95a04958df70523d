"""The `Models` of a served engine: this server's, or ONNX Runtime in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinbrush.engine.models import PlacedModels
from twinbrush.engine.threads import Fail
from twinbrush.runtime_choice import Runtime, chosen_runtime


def open_models(model_repository: Path, config: Mapping[str, Any], fail: Fail) -> PlacedModels:
    """The networks beside the engine's model.

    Args:
        model_repository: the engine's folder as Triton names it; it may be a link into the
            repository that holds the networks.
        config: the engine's `config.pbtxt` in Triton's JSON form.
        fail: called with a sentence when the process of a network hangs or has died.

    Raises:
        ValueError: the parameter `runtime` is not allowed.
        RuntimeError: a network cannot be loaded.
    """
    if chosen_runtime(config, os.environ) == Runtime.IN_PROCESS:
        from twinbrush.runtimes.onnx_runtime import LocalModels

        return LocalModels(model_repository.resolve().parent, on_gpu=True)
    from twinbrush.triton.models import TritonModels

    return TritonModels(fail)
