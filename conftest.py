"""Makes the fixtures of `tests/harness.py`, `gateways.py` and `browsers.py` known to the tests of every room."""

from hypothesis import settings

pytest_plugins = ["harness", "gateways", "browsers"]

# The same examples in every run, whatever the load.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")
