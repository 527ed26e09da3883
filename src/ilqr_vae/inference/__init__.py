"""Inference of inputs from observations: iLQR, its gradient, its posterior and the ELBO."""
