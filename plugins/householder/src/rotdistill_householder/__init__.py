"""Improve tied rotations by closed-form Householder reflections."""
