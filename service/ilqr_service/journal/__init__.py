"""The append-only journal of a running service, and what is made from it."""
