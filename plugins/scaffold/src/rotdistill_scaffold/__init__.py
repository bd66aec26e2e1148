"""Verbs of authors: rotdistill new, the beginning of a step, an adapter or a recipe; plugins and
schema, what is installed."""
