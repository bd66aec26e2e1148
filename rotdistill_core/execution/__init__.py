"""Carrying out a recipe: keys, order and reuse, one step's call, observers, and finished runs."""
