"""A checkpoint in diffusers layout in, a model repository out. `python -m export --help`."""
