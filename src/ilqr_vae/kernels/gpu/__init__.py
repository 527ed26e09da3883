"""Triton kernels. ``launch`` says which problems fit and how kernels are launched."""
