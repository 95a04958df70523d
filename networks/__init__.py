"""Torch modules and weights that export and training share."""
