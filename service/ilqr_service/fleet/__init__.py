"""Many servers behind one address: Ray actors that serve, and a gateway that knows where.

A client opens a session at the gateway and is told where it lives; bins and answers then go between
the client and its server alone. A server that dies leaves its journal: another one takes it up.
"""

PATIENCE_S = 3.0
"""How long a server may not answer until it counts as dead."""
