"""Architectures as tables: which space each axis of each parameter lives in."""
