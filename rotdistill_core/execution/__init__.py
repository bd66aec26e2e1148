"""Carrying out a recipe: keys, order, the executor, results, and run folders."""
