"""The texts of a run: questions read and split, conversations tokenised, tokens packed."""
