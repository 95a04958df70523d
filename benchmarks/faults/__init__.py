"""What faults, overload and bad clients do to a running server."""
