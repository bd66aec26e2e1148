"""Cut layers, neurons, key/value heads and stream out of the student."""
