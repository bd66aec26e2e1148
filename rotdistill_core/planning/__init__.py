"""What a run would need before it starts: model sizes, text counts, cost of each step, reuse."""
