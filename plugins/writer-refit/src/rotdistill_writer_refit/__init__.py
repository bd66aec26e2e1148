"""Refit the matrices that write into the residual stream, in closed form."""
