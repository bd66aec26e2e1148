"""What aligners share: paired residual streams, and assignment of heads and neurons."""
