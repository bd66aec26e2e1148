"""The texts of a run: conversations read, split and tokenised, tokens packed."""
