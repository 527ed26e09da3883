"""Many servers behind one address: servers in Ray actors, and a gateway that locates sessions.

A client opens a session at the gateway and is redirected to a server. Bins and answers then go
directly between client and server. When a server dies, another one takes over its sessions from its
journal.
"""

PATIENCE_S = 3.0
"""Seconds without a reply after which a server counts as dead."""
