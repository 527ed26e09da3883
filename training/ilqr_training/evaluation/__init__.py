"""Evaluation reports, baselines and stress tests."""
