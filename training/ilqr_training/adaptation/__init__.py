"""Units that come, go and change: a model file for another day, without labels."""
