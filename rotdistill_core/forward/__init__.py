"""Running models: the layerwise forward pass, captured activations, generation, certificates."""
