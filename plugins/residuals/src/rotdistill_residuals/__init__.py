"""Capture the residual streams of teacher and student at every layer boundary."""
