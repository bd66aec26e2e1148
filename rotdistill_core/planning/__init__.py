"""Estimates before a run: sizes of models and texts, costs of steps, results to reuse."""
