"""Adaptation of a model to units that appear, vanish and change, without labels."""
