"""Shared by service and clients: messages, keys and clocks."""
