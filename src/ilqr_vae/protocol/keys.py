"""CURVE keys of a service and its clients, as small TOML files in a folder.

``server.key`` is the key pair of the service. ``NAME.key`` is that of a client, together with the
service's public key, so that a client needs only this file. ``authorized.toml`` lists the admitted
clients and their roles. Files with a secret are readable only by their owner.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from collections import Counter
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from ilqr_vae.errors import ConfigError
from ilqr_vae.files import read_toml, write_whole

Role = Literal["feed", "read", "control"]
ROLES: tuple[Role, ...] = ("feed", "read", "control")
SERVER, AUTHORIZED = "server.key", "authorized.toml"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
VARIABLE = "ILQR_VAE_KEY"
_MOST_BYTES = 1 << 20
_MOST_DOTS = 1000
"""Limit per line of the allow-list, since TOML parsing is quadratic in the parts of a key."""
T = TypeVar("T")


def _check(field: str, key: str) -> None:
    """Raise ValueError if ``key`` is not 32 bytes in Z85."""
    try:
        sound = len(z85.decode(key.encode("ascii"))) == 32
    except (ValueError, KeyError, struct.error):
        sound = False
    if not sound:
        raise ValueError(f"{field}: expected 40 characters of Z85, got {key[:60]!r}")


class ServerKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A service's key pair, Z85."""

    public: str
    secret: str

    def __post_init__(self) -> None:
        _check("public", self.public)
        _check("secret", self.secret)
        if zmq.curve_public(self.secret.encode()).decode() != self.public:
            raise ValueError("public: expected the public key of `secret`, got another")


class ClientKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client's key pair and the public key of its service, Z85."""

    name: str
    public: str
    secret: str
    server: str

    def __post_init__(self) -> None:
        for field in ("public", "secret", "server"):
            _check(field, getattr(self, field))

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Use this key for a socket that is not connected yet."""
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()
        socket.curve_serverkey = self.server.encode()


class Client(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An admitted client: name, public key and roles."""

    name: str
    public: str
    roles: tuple[Role, ...]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: expected 1-64 of [A-Za-z0-9._-], got {self.name[:80]!r}")
        _check(f"public of {self.name}", self.public)


class Authorized(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The allow-list."""

    client: tuple[Client, ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "public"):
            times = Counter(getattr(c, field) for c in self.client)
            if twice := [value for value, count in times.items() if count > 1]:
                raise ValueError(f"{field}: expected each once, got {twice[0]!r} twice")


def _toml(values: object) -> bytes:
    """Format the two file types as TOML; no string contains quotes or backslashes."""
    if isinstance(values, Authorized):
        blocks = [
            f"[[client]]\nname = '{c.name}'\npublic = '{c.public}'\n"
            f"roles = [{', '.join(repr(r) for r in c.roles)}]\n"
            for c in values.client
        ]
        return "\n".join(blocks).encode()
    table: dict[str, str] = msgspec.to_builtins(values)
    return "".join(f"{key} = '{value}'\n" for key, value in table.items()).encode()


def _read(path: Path, kind: type[T]) -> T:
    try:
        return read_toml(path, kind, "keys")
    except ConfigError as error:
        where = error.field if path.name in error.field else f"keys {path.name}: {error.field}"
        raise ConfigError(where, expected=error.expected, got=error.got) from error


def read_client_key(path: Path) -> ClientKey:
    """Raises ConfigError."""
    return _read(path, ClientKey)


def key_from_environment() -> ClientKey | None:
    """Return the key that ``ILQR_VAE_KEY`` names, if set. Raises ConfigError."""
    path = os.environ.get(VARIABLE)
    return read_client_key(Path(path)) if path else None


def read_server_key(folder: Path) -> ServerKey:
    """Raises ConfigError."""
    return _read(folder / SERVER, ServerKey)


def read_authorized(folder: Path) -> Authorized:
    """Return the allow-list; empty if there is none yet. Raises ConfigError."""
    path = folder / AUTHORIZED
    try:
        found = path.stat()
    except FileNotFoundError:
        return Authorized()
    except OSError as error:
        raise ConfigError(f"keys {AUTHORIZED}", expected="a file", got=str(error)) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:  # read by a running service
        got = f"{found.st_size} bytes" if found.st_size else "none"
        raise ConfigError(
            f"keys {AUTHORIZED}", expected=f"a file of at most {_MOST_BYTES} bytes", got=got
        )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if sum(line.count(b".") ** 2 for line in file) > _MOST_DOTS**2:
            raise ConfigError(
                f"keys {AUTHORIZED}", expected="keys of a few parts", got="keys of thousands"
            )
    return _read(path, Authorized)


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def make_server_key(folder: Path) -> ServerKey:
    """Return the key pair of the service, created if there is none. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError("keys", expected="a folder", got=str(error)) from error
    if (folder / SERVER).exists():
        return read_server_key(folder)
    public, secret = _pair()
    key = ServerKey(public=public, secret=secret)
    write_whole(folder / SERVER, _toml(key), "keys", mode=0o600)
    return key


def add_client(folder: Path, name: str, roles: tuple[Role, ...]) -> Path:
    """Create a client's key and admit it; return the key file.

    Raises:
        ConfigError: the name is not 1-64 of [A-Za-z0-9._-] or is taken, or there is no role.
    """
    if not NAME.fullmatch(name) or name in ("server", "authorized"):
        raise ConfigError("name", expected="1-64 of [A-Za-z0-9._-]", got=repr(name))
    if not roles:
        raise ConfigError("role", expected=f"at least one of {', '.join(ROLES)}", got="none")
    server = make_server_key(folder)
    known = read_authorized(folder)
    path = folder / f"{name}.key"
    if path.exists() or any(c.name == name for c in known.client):
        raise ConfigError("name", expected="one that is not taken", got=repr(name))
    public, secret = _pair()
    key = ClientKey(name=name, public=public, secret=secret, server=server.public)
    write_whole(path, _toml(key), "keys", mode=0o600)
    client = Client(name=name, public=public, roles=roles)
    write_whole(folder / AUTHORIZED, _toml(Authorized(client=(*known.client, client))), "keys")
    return path


def revoke_client(folder: Path, name: str) -> None:
    """Revoke a client's key; its file stays. Raises ConfigError if there is no such client."""
    known = read_authorized(folder)
    kept = tuple(c for c in known.client if c.name != name)
    if len(kept) == len(known.client):
        raise ConfigError("name", expected="a client that is let in", got=repr(name))
    write_whole(folder / AUTHORIZED, _toml(Authorized(client=kept)), "keys")
