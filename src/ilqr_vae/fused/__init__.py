"""Whole solves in compiled code: the CPU backend of ``ilqr`` and ``horizon`` for built-in families.

``solver`` and ``estimator`` are the torch side; every other module is numba code. What is computed
is defined by the torch code they stand in for, and tested against it.
"""
