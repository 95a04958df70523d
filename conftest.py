"""Makes the fixtures of `tests/harness.py` and `gateways.py` known to the tests of every room."""

pytest_plugins = ["harness", "gateways"]
