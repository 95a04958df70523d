"""The comparison of INT8 with FP32."""

import numpy as np
import pytest
from harness import open_engine

from benchmarks.int8 import OPERATORS, PROMPTS, Recorded, compared
from export.painting import paint
from twinbrush.runtimes.onnx_runtime import LocalModels


@pytest.fixture(scope="module")
def calls(repository):
    """Inputs of the largest call of every network, of four prompts that are encoded at once."""
    models = Recorded(LocalModels(repository))
    engine = open_engine(repository, models)
    paint(engine, PROMPTS, steps=np.array([1]))
    engine.close()
    return models.calls


def test_inputs_of_the_largest_call_are_kept(calls):
    assert set(calls) == {"clip_text", "bert", "fusion", "unet", "vqgan_decoder"}
    assert len(calls["unet"]["sample"]) > 1


def test_int8_is_compared_on_the_inputs_of_the_engine(repository, calls):
    found = compared(repository / "bert", calls["bert"], turns=1)
    assert found["rows"] == len(calls["bert"]["input_ids"])
    for name in OPERATORS:
        assert 0 < found[name]["error"] < 0.5
        assert found[name]["speed"] > 0
