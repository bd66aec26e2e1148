"""Align residual streams: orthogonal Procrustes, CCA, and a random rotation as their control."""
