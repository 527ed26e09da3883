"""Other implementations of the same computation, measured in the same run."""
