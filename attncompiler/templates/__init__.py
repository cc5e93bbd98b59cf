"""Kernels with holes."""
