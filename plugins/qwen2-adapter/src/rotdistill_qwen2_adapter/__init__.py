"""Architecture table of Qwen2 and Qwen2.5."""
