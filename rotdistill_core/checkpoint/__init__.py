"""Checkpoints on disk: headers, lazy tensors, weights with pending edits, and opening the models of a recipe."""
