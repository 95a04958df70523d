"""The only package that sees Triton's Python API."""
