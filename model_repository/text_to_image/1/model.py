"""The unary front door, wired to Triton."""

from twinbrush.triton.front_doors import UnaryModel as TritonPythonModel  # noqa: F401
