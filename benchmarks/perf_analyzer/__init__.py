"""Triton's own perf_analyzer, driven over sweeps of load; `python -m benchmarks.perf_analyzer`."""
