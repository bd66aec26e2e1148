"""Bring a model into another's basis: weight matching, and gauges inside heads and neurons."""
