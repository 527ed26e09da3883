"""Which inputs explain the observations: iLQR, its gradient, its posterior and the ELBO."""
