"""Cut layers, neurons, heads and stream out of the student."""
