"""Score variants on task files of one's own with the LM Evaluation Harness."""
