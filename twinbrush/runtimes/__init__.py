"""Runtimes: implementations of the engine's `Models` protocol."""
