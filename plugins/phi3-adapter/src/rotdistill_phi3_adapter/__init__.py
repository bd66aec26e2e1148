"""Architecture table of Phi-3 and the dense Phi-4 models."""
