"""Who may connect and do what: CURVE keys, a ZAP allow-list, roles, and a limit on control.

libzmq asks, over an inproc socket, about every connection to a socket that has a key. Whoever is
not on the list gets no connection and is counted. The user's name then comes with each message.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from ilqr_service import logs
from ilqr_vae.errors import ConfigError, ProtocolError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import AUTHORIZED, Role, read_authorized, read_server_key

_ZAP = "inproc://zeromq.zap.01"
_NEEDS: dict[type[messages.Message], Role] = {
    messages.Open: "feed",
    messages.Bin: "feed",
    messages.Close: "feed",
    messages.Load: "control",
    messages.Swap: "control",
    messages.Rollback: "control",
}


class Gate:
    """The allow-list at work. Used by the I/O thread alone.

    Args:
        context: that of the sockets it guards.
        folder: of the keys; see ``ilqr_vae.protocol.keys``.

    Attributes:
        socket: to be polled; ``answer`` when it has something.

    Raises:
        ConfigError: no server key in ``folder``, or an allow-list that cannot be read.
    """

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        self._folder = folder
        self._key = read_server_key(folder)
        self._seen = 0.0
        self._names: dict[bytes, str] = {}
        self._roles: dict[str, tuple[Role, ...]] = {}
        self._strangers = 0
        self.refresh()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP)

    def refresh(self) -> None:
        """Read the list again where it has changed; one that cannot be read leaves the old."""
        path = self._folder / AUTHORIZED
        try:
            changed = path.stat().st_mtime if path.exists() else 0.0
            if changed == self._seen and self._roles:
                return
            clients = read_authorized(self._folder).client
        except (OSError, ConfigError):
            if not self._roles:
                raise
            logs.warning("the allow-list cannot be read; the old one stays")
            return
        self._seen = changed
        self._names = {z85.decode(c.public.encode()): c.name for c in clients}
        self._roles = {c.name: c.roles for c in clients}

    def guard(self, socket: zmq.Socket[bytes], domain: str) -> None:
        """Let only those on the list connect; before the socket is bound."""
        socket.curve_server = True
        socket.curve_secretkey = self._key.secret.encode()
        socket.curve_publickey = self._key.public.encode()
        socket.zap_domain = domain.encode()

    def answer(self) -> None:
        """Answer what libzmq asks."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, request, domain, _, _, mechanism, *credentials = frames
            name = ""
            if mechanism == b"CURVE" and credentials:
                name = self._names.get(credentials[0], "")
            ok = bool(name) and (domain != b"results" or "read" in self._roles[name])
            if not ok:
                self._strangers += 1
            reply = [b"200", b"OK", name.encode()] if ok else [b"400", b"no", b""]
            self.socket.send_multipart([version, request, *reply, b""])

    def strange(self) -> Counter[str]:
        """Connections refused since the last call."""
        strangers, self._strangers = self._strangers, 0
        return Counter({"refused:key": strangers} if strangers else {})

    def check(self, user: str, message: messages.Message) -> None:
        """Raises ProtocolError where the user's roles do not cover the message."""
        needed = _NEEDS.get(type(message))
        roles = self._roles.get(user, ())
        if needed is not None and needed not in roles:
            raise ProtocolError(
                "role", expected=needed, got=f"{user or 'nobody'} ({', '.join(roles) or 'none'})"
            )


class RateLimit:
    """So many requests a second of each sender, with twice as many saved up at most.

    Args:
        rate: requests per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._held: dict[bytes, tuple[float, int]] = {}

    def check(self, sender: bytes, now_ns: int) -> None:
        """Raises ProtocolError where the sender asks too often."""
        held, then = self._held.pop(sender, (2 * self._rate, now_ns))
        held = min(2 * self._rate, held + (now_ns - then) / 1e9 * self._rate)
        over = held < 1.0
        self._held[sender] = (held if over else held - 1.0, now_ns)
        if len(self._held) > 4096:
            del self._held[next(iter(self._held))]
        if over:
            raise ProtocolError(
                "rate", expected=f"at most {self._rate:g} requests a second", got="more"
            )
