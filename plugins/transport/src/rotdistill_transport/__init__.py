"""Carry a fine-tune or a LoRA of one model into another, in closed form. See `step`."""
