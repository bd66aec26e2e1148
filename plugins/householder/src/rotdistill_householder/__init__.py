"""Improve rotations of the residual stream by closed-form Householder reflections."""
