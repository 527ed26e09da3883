"""Bridges to other lab software. Some need a package, installed by the extra of the same name."""
