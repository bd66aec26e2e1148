"""Score variants by their agreement with the teacher on held-out answers. See `step`."""
