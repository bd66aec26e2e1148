"""Fold rotations, permutations and gauges into a model's weights, exactly."""
