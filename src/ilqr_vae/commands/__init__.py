"""Verbs of the library itself: the demo and the keys."""
