"""Architecture table of Llama, SmolLM2 and kin."""
