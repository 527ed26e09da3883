"""Moving-horizon estimation: one bin in, one estimate out."""
