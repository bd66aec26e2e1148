"""Architecture table of Qwen3."""
