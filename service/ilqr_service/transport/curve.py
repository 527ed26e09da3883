"""The server's side of CurveZMQ (RFC 26) for one connection: handshake and sealed frames.

The primitives are those of libsodium, through PyNaCl. The short-term keys stay in this object, so
the cookie need not carry them: it is random, and must come back unchanged.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from nacl import bindings
from nacl.exceptions import CryptoError

OVERHEAD = 33
"""Number of bytes that sealing adds to a frame."""

_HELLO, _INITIATE, _MESSAGE = b"\x05HELLO", b"\x08INITIATE", b"\x07MESSAGE"


class CurveError(Exception):
    """The peer's part of the handshake, or a sealed frame, is not valid."""


class KeyRefused(Exception):
    """The peer has a key that is not admitted."""


def _open(box: bytes, nonce: bytes, shared: bytes) -> bytes:
    try:
        return bindings.crypto_box_open_afternm(box, nonce, shared)
    except CryptoError as error:
        raise CurveError("a box that does not open") from error


def _shared(public: bytes, secret: bytes) -> bytes:
    try:
        return bindings.crypto_box_beforenm(public, secret)
    except (CryptoError, RuntimeError) as error:  # a public key of low order
        raise CurveError("a public key that is none") from error


class Curve:
    """The state of one connection.

    Args:
        public, secret: the service's long-term keys, 32 bytes each.
        admits: returns whether a client's long-term public key is admitted.

    Attributes:
        client: long-term public key of the client once the handshake is complete; else empty.
    """

    def __init__(self, public: bytes, secret: bytes, admits: Callable[[bytes], bool]) -> None:
        self.client = b""
        self._public, self._secret, self._admits = public, secret, admits
        self._cookie = self._client_short = self._own_secret = self._shared = b""
        self._received = self._sent = 0

    def hello(self, body: bytes) -> bytes:
        """Return the WELCOME that answers a HELLO. Raises CurveError."""
        if len(body) != 200 or not body.startswith(_HELLO) or body[6:8] != b"\x01\x00":
            raise CurveError("not a HELLO of version 1.0")
        self._client_short = body[80:112]
        with_client = _shared(self._client_short, self._secret)
        if _open(body[120:], b"CurveZMQHELLO---" + body[112:120], with_client) != bytes(64):
            raise CurveError("a HELLO that is not signed")
        own_public, self._own_secret = bindings.crypto_box_keypair()
        self._cookie = os.urandom(96)
        nonce = os.urandom(16)
        box = bindings.crypto_box_afternm(
            own_public + self._cookie, b"WELCOME-" + nonce, with_client
        )
        return b"\x07WELCOME" + nonce + box

    def initiate(self, body: bytes) -> bytes:
        """Return the client's metadata from its INITIATE. Raises CurveError, KeyRefused."""
        if len(body) < 257 or not body.startswith(_INITIATE):
            raise CurveError("not an INITIATE")
        if not hmac.compare_digest(body[9:105], self._cookie):
            raise CurveError("another cookie")
        self._shared = _shared(self._client_short, self._own_secret)
        plain = _open(body[113:], b"CurveZMQINITIATE" + body[105:113], self._shared)
        client, nonce, vouch = plain[:32], plain[32:48], plain[48:128]
        with_client = _shared(client, self._own_secret)
        if _open(vouch, b"VOUCH---" + nonce, with_client) != self._client_short + self._public:
            raise CurveError("a vouch for something else")
        if not self._admits(client):
            raise KeyRefused
        self.client = client
        self._received = int.from_bytes(body[105:113])
        return plain[128:]

    def ready(self, metadata: bytes) -> bytes:
        """Return the READY that completes the handshake."""
        return b"\x05READY" + self._box(b"CurveZMQREADY---", metadata)

    def seal(self, flags: int, body: bytes) -> bytes:
        """Return the frame body that carries ``body``; ``flags``: 1 is more, 2 is a command."""
        return _MESSAGE + self._box(b"CurveZMQMESSAGES", bytes([flags]) + body)

    def unseal(self, body: bytes) -> tuple[int, bytes]:
        """Return flags and body of a sealed frame. Raises CurveError if it is invalid or
        replayed.
        """
        if len(body) < OVERHEAD or not body.startswith(_MESSAGE):
            raise CurveError("not a sealed frame")
        nonce = int.from_bytes(body[8:16])
        if nonce <= self._received:
            raise CurveError("a frame that came before")
        plain = _open(body[16:], b"CurveZMQMESSAGEC" + body[8:16], self._shared)
        self._received = nonce
        return plain[0], plain[1:]

    def _box(self, prefix: bytes, plain: bytes) -> bytes:
        self._sent += 1
        nonce = self._sent.to_bytes(8)
        return nonce + bindings.crypto_box_afternm(plain, prefix + nonce, self._shared)
