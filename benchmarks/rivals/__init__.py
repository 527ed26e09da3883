"""Other implementations of the same work, measured in the same run."""
