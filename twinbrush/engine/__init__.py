"""The engine: from a request to pictures, in plain Python and NumPy."""
