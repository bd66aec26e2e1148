"""Fit the head to the teacher's logits by ridge regression, from second moments."""
