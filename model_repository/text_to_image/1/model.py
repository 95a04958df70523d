"""The unary front door, wired to Triton."""

from twinbrush.triton_io import UnaryModel as TritonPythonModel  # noqa: F401
