"""Bridges from and to what labs have. Each needs a package of its own, by an extra of its name."""
