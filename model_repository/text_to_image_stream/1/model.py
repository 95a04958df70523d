"""The streaming front door and the engine, wired to Triton."""

from twinbrush.triton.front_doors import StreamModel as TritonPythonModel  # noqa: F401
