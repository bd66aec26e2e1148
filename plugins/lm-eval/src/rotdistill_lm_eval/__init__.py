"""Score variants on local task files with EleutherAI's LM Evaluation Harness."""
