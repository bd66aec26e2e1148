"""Merge checkpoints and LoRA adapters out of core; measure the barrier between them."""
