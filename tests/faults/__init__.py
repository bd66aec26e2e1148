"""The fault matrix: what may happen to a run, and what must follow. `python -m tests.faults`."""
