"""Makes the fixtures of `harness.py`, `gateways.py` and `browsers.py` known to all rooms' tests."""

from hypothesis import settings

pytest_plugins = ["harness", "gateways", "browsers"]

# The same examples in every run, whatever the load.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")
