"""Distil the teacher's own continuations into a LoRA, and fold it into the weights. See `step`."""
