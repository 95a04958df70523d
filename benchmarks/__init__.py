"""Measurements of the server and of what it serves; results are committed with plots."""
