"""The launcher: finds, runs and watches a Triton server."""
