"""Checkpoints on disk: headers, lazy tensors, weights with pending edits, models and references."""
