"""Many trainings and evaluations at once, scheduled by Ray: sweeps and archives."""
