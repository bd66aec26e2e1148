"""Architecture table of SmolLM3."""
