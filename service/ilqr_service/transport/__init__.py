"""Sockets, connections, keys and HTTP."""
