"""Numba kernels. What each computes is defined by the torch code it stands in for."""
