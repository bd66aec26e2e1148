"""Fit the LM head to the teacher's logits, from second moments or by their KL. See `step`."""
