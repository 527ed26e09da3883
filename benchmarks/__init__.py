"""Benchmarks: ``python -m benchmarks lqr|stream|train|service|gpu --json F [--quick]``."""
