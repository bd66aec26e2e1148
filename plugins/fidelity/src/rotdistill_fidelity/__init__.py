"""Score variants against the teacher on held-out answers."""
