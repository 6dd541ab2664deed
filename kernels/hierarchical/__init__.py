"""Triton kernels of the hierarchical rule."""
