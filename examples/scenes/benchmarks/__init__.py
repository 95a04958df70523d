"""Measurements of the scenes checkpoint."""
