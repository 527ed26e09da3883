"""Compiled code, and the switch that chooses it."""
