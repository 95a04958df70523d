"""The streaming front door and the engine, wired to Triton."""

from twinbrush.triton_io import StreamModel as TritonPythonModel  # noqa: F401
