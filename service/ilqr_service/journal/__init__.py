"""The append-only journal of a service: writing, resuming, verifying and exporting it."""
