"""Running a model: layer by layer, captured activations, generation, certificates."""
