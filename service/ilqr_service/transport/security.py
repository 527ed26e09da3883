"""Access control: CURVE keys, an allow-list, roles, and a rate limit on requests."""

from __future__ import annotations

from pathlib import Path

from zmq.utils import z85

from ilqr_service import logs
from ilqr_service.transport.curve import Curve
from ilqr_vae.errors import ConfigError, ProtocolError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import AUTHORIZED, Authorized, Role, read_authorized, read_server_key

_NEEDS: dict[type[messages.Message], Role] = {
    messages.Open: "feed",
    messages.Bin: "feed",
    messages.Spikes: "feed",
    messages.Event: "feed",
    messages.Close: "feed",
    messages.Load: "control",
    messages.Swap: "control",
    messages.Rollback: "control",
}


class Gate:
    """The current allow-list. Only the I/O thread may use it.

    Args:
        folder: folder of the keys; see ``ilqr_vae.protocol.keys``.

    Raises:
        ConfigError: ``folder`` has no server key, or the allow-list cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / AUTHORIZED
        key = read_server_key(folder)
        self._public, self._secret = (z85.decode(k.encode()) for k in (key.public, key.secret))
        self._seen = self._read = self._signature()
        self._take(read_authorized(folder))

    def refresh(self) -> bool:
        """Reload the list if it has changed; return whether a new one is in force.

        If it cannot be read, the old one stays in force and this is logged once. A list that is
        empty or unreadable may still be being written: it counts only if it is the same at the next
        call.
        """
        before, self._seen = self._seen, self._signature()
        if self._seen == self._read:
            return False
        settled = self._seen == before
        try:
            if self._seen is None:
                raise ConfigError("keys", expected=f"a readable {AUTHORIZED}", got="none")
            authorized = read_authorized(self._path.parent)
        except ConfigError as error:
            if settled:
                self._read = self._seen
                logs.error("the allow-list cannot be read; the old one stays", error=str(error))
            return False
        if not (settled or authorized.client):
            return False
        self._read = self._seen
        self._take(authorized)
        return True

    def curve(self, door: str) -> Curve:
        """Return the handshake for a connection to a door."""
        return Curve(self._public, self._secret, lambda key: self.admits(key, door))

    def admits(self, key: bytes, door: str) -> bool:
        """Return whether a public key may connect to a door."""
        name = self.user(key)
        return bool(name) and (door != "results" or "read" in self._roles[name])

    def user(self, key: bytes) -> str:
        """Return the name of the user with this public key; "" if there is none."""
        return self._names.get(key, "")

    def check(self, user: str, message: messages.Message) -> None:
        """Raise ProtocolError if the user's roles do not permit the message."""
        needed = _NEEDS.get(type(message))
        roles = self._roles.get(user, ())
        if not roles or (needed is not None and needed not in roles):
            raise ProtocolError(
                "role",
                expected=needed or "a user who is let in",
                got=f"{user or 'nobody'} ({', '.join(roles) or 'none'})",
            )

    def _take(self, authorized: Authorized) -> None:
        self._names = {z85.decode(c.public.encode()): c.name for c in authorized.client}
        self._roles = {c.name: c.roles for c in authorized.client}

    def _signature(self) -> tuple[int, ...] | None:
        """Return a signature that changes with the file; None if there is none."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


_SHARE = 0.1


class RateLimit:
    """A limit of requests per second and sender, with a burst of twice as many.

    Answers may take a tenth of the service's time: a slow one counts as several requests.

    Args:
        rate: requests per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._held: dict[bytes, tuple[float, int]] = {}

    def check(self, sender: bytes, now_ns: int) -> None:
        """Raise ProtocolError if the sender exceeds the limit."""
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

    def charge(self, sender: bytes, took_ns: int) -> None:
        """Charge the time of an answer, if it exceeds that of one request."""
        held, then = self._held[sender]
        more = max(0.0, took_ns / 1e9 * self._rate / _SHARE - 1.0)
        self._held[sender] = (held - more, then)
