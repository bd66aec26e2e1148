"""Scores: metric rows, KL to the teacher, acceptance of an edit, intervals, release gates."""
