"""Models in .gguf files, in files of Python packages, and on the Hugging Face hub."""
