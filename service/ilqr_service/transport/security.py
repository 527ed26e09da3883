"""Who may connect and do what: CURVE keys, an allow-list, roles, and a limit on control."""

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
    """The allow-list at work. Used by the I/O thread alone.

    Args:
        folder: of the keys; see ``ilqr_vae.protocol.keys``.

    Raises:
        ConfigError: no server key in ``folder``, or an allow-list that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / AUTHORIZED
        key = read_server_key(folder)
        self._public, self._secret = (z85.decode(k.encode()) for k in (key.public, key.secret))
        self._seen = self._read = self._signature()
        self._take(read_authorized(folder))

    def refresh(self) -> bool:
        """Read the list again where it has changed; True where another one holds from here on.

        One that cannot be read leaves the old one, and is logged once. Where it is empty or cannot
        be read it may be in the middle of being written: it counts when it is the same at the next
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
        """The handshake of a connection to a door."""
        return Curve(self._public, self._secret, lambda key: self.admits(key, door))

    def admits(self, key: bytes, door: str) -> bool:
        """Whether a public key may connect there."""
        name = self.user(key)
        return bool(name) and (door != "results" or "read" in self._roles[name])

    def user(self, key: bytes) -> str:
        """The name of the user with that public key; "" where there is none."""
        return self._names.get(key, "")

    def check(self, user: str, message: messages.Message) -> None:
        """Raises ProtocolError where the user's roles do not cover the message."""
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
        """What differs where the file does; None where there is none."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


_SHARE = 0.1


class RateLimit:
    """So many requests a second of each sender, with twice as many saved up at most.

    Answering them may take a tenth of the service's time: one that takes long counts for many.

    Args:
        rate: requests per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._held: dict[bytes, tuple[float, int]] = {}

    def check(self, sender: bytes, now_ns: int) -> None:
        """Raises ProtocolError if the sender asks too often."""
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
        """Count the time that an answer took, if that is more than its one request stands for."""
        held, then = self._held[sender]
        more = max(0.0, took_ns / 1e9 * self._rate / _SHARE - 1.0)
        self._held[sender] = (held - more, then)
