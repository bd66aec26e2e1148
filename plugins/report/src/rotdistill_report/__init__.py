"""The report of a run, model cards, and the notebook that recomputes its rotations."""
