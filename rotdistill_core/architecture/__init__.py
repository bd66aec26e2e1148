"""Architectures as tables: the space that each axis of each parameter lives in."""
