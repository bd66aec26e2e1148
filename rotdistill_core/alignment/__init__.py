"""What aligners share: paired residual streams, and the assignment of heads and neurons."""
