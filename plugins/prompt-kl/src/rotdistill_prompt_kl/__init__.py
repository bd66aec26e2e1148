"""Style from short continuations: train a LoRA on the teacher's logits behind the system prompt, and fold it."""
