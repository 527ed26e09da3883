"""A simulated subject that reaches for targets."""
