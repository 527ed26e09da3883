"""Compiled code, and the switch that chooses it."""

ARITHMETIC = 2
"""Raised whenever the compiled code gives other bits, by rounding, on the same inputs and
processor (``tests/test_bits.py``). Journals name it, so that ``verify`` can say why bits differ."""
