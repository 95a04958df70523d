"""Makes the fixtures of `harness.py`, `gateways.py` and `browsers.py` known to all rooms' tests."""

import pytest
from hypothesis import settings

pytest_plugins = ["harness", "gateways", "browsers"]

# The same examples in every run, whatever the load.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")

# Files that take a minute or more. They begin first, so that the processes of a run end together;
# neighbours trace other networks, so that no process waits for the trace of another.
LONG = (
    "test_families", "test_recover", "test_lora_set", "test_training_commands", "test_export",
    "test_stages", "test_gate", "test_seeds", "test_precision", "test_fusion_training",
    "test_prune", "test_any_checkpoint", "test_server", "test_tensorrt", "test_wire", "test_drain",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
