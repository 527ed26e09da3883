"""ZMTP by the service's own hand: identities, handshakes, frames and limits, from raw sockets.

Everything here is a real connection over loopback to a real ``Connections``; the peers are libzmq's
sockets where they behave, and bytes where they do not.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from feeder import WAIT_S
from ilqr_service.transport.zmtp import Incoming, Peer, frame
from ilqr_vae.protocol.keys import ClientKey, add_client, read_client_key, revoke_client
from station import GREETING, LIMIT, Station, ready

FULL = os.environ.get("CHAOS") == "full"


@pytest.fixture
def station() -> Iterator[Station]:
    station = Station()
    yield station
    station.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    for name in ("rig", "reader", "gone"):
        add_client(path, name, ("read",) if name == "reader" else ("feed", "read"))
    return path


@pytest.fixture
def keyed(folder: Path) -> Iterator[Station]:
    station = Station(folder)
    yield station
    station.close()


def key(folder: Path, name: str) -> ClientKey:
    return read_client_key(folder / f"{name}.key")


# ---- identities --------------------------------------------------------------------------------


def test_an_identity_that_a_peer_claims_is_nobodys(station: Station) -> None:
    """Neither another peer's, nor one that libzmq's ROUTER would assign: each peer is answered by
    its own connection, whatever identities there are."""
    claimed = [b"\0" + struct.pack(">I", n) for n in range(0x6B8B4567, 0x6B8B4567 + 40)]
    claimed += [b"same", b"same", b"", b"\0", n.to_bytes(8) if (n := 1) else b""]
    peers: list[socket.socket] = []
    for n, identity in enumerate(claimed):
        peers.append(station.raw(GREETING, ready(identity=identity), frame(b"%d" % n)))
        peers.append(station.raw(GREETING, ready(), frame(b"plain %d" % n)))
    came = station.comes(len(peers))
    assert len({received.owner for received in came}) == len(peers)
    for n, peer in enumerate(peers):
        expected = frame(b"%d" % (n // 2) if n % 2 == 0 else b"plain %d" % (n // 2))
        assert received_by(peer, expected)
    assert station.events == {}


def received_by(peer: socket.socket, expected: bytes) -> bool:
    """Whether these bytes come, behind whatever else."""
    got = b""
    while expected not in got:
        data = peer.recv(65536)
        if not data:
            return False
        got += data
    return True


def test_a_reader_with_a_key_claims_identities_in_vain(keyed: Station, folder: Path) -> None:
    start = 0xE43C9869  # the first that libzmq's ROUTER assigns beside a ZAP handler
    for n in range(30):
        identity = b"\0" + struct.pack(">I", start + n)
        dealer = keyed.dealer(key=key(folder, "reader"), identity=identity)
        assert keyed.echoes(dealer) == b"echo"
        assert keyed.echoes(keyed.dealer(key=key(folder, "rig"))) == b"echo"
    assert keyed.events == {}


# ---- peers that behave -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 254, 255, 256, LIMIT])
@pytest.mark.parametrize("curve", [False, True])
def test_messages_of_any_size_go_both_ways(
    station: Station, keyed: Station, folder: Path, curve: bool, size: int
) -> None:
    here = keyed if curve else station
    dealer = here.dealer(key=key(folder, "rig") if curve else None)
    for n in range(5):
        body = bytes([n]) * size
        assert here.echoes(dealer, body) == body


def test_a_req_client_is_answered(station: Station) -> None:
    req = station.dealer(zmq.REQ)
    for n in range(3):
        assert station.echoes(req, b"%d" % n) == b"%d" % n


def test_several_frames_and_too_many_bytes_are_told_from_one(station: Station) -> None:
    dealer = station.dealer()
    dealer.send_multipart([b"a", b"b"])
    dealer.send(b"x" * (LIMIT + 1))
    dealer.send_multipart([b"", b"x" * (3 * LIMIT)])
    dealer.send(b"fine")
    came = [received.message for received in station.comes(4)]
    station.raw(GREETING, ready(), frame(b"x", 1) * 20_000, frame(b""))
    assert station.comes()[0].message == (b"", 20_001, 20_000, "")
    assert [(m.parts, m.size) for m in came] == [
        (2, 2),
        (1, LIMIT + 1),
        (2, 3 * LIMIT),
        (1, 4),
    ]
    assert [m.body for m in came] == [b"", b"", b"", b"fine"]


def test_heartbeats_of_a_peer_are_answered(station: Station) -> None:
    peer = station.raw(GREETING, ready(), frame(b"\x04PING\x00\x0acontext", 4), frame(b"after"))
    station.comes()
    assert received_by(peer, frame(b"\x04PONGcontext", 4) + frame(b"after"))


def test_a_bin_that_came_before_nonsense_is_not_lost(station: Station) -> None:
    station.raw(GREETING, ready(), frame(b"whole"), b"\xff\xff\xff")
    assert [received.message.body for received in station.comes()] == [b"whole"]
    station.until("refused:message")


# ---- peers that do not -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "handshake"),
        (b"\x01\x00", "handshake"),  # ZMTP 1.0
        (GREETING[:10] + b"\x01", "handshake"),  # ZMTP 2.0
        (GREETING.replace(b"NULL\0", b"PLAIN"), "handshake"),
        (GREETING.replace(b"NULL\0", b"CURVE"), "handshake"),
        (GREETING + frame(b"message first"), "handshake"),
        (GREETING + ready(b"SUB"), "handshake"),
        (GREETING + ready()[:-1] + b"\xff" * 3000, "handshake"),
        (GREETING + frame(b"\x05READY\x01", 4), "handshake"),
        (GREETING + ready(extra=b"\x01X" + struct.pack(">I", 100_000_000)), "handshake"),
        (GREETING + ready(identity=b"i" * 5000), "handshake"),
        (GREETING + ready() + b"\xf8\x01a", "message"),
        (GREETING + ready() + b"\x02" + b"\xff" * 8, ""),
        (GREETING + ready() + b"\x02" + struct.pack(">Q", 4 * LIMIT + 1), ""),
        (GREETING + ready() + frame(b"\x04PING", 4), "message"),
        (GREETING + ready() + frame(b"x" * LIMIT, 1) * 5, ""),
        (GREETING + ready(b"REQ") + frame(b"no delimiter"), "message"),
    ],
)
def test_who_breaks_the_protocol_is_cut_off_and_counted(
    station: Station, data: bytes, reason: str
) -> None:
    steady = station.dealer()
    assert station.echoes(steady) == b"echo"
    peer = station.raw(data)
    station.until("disconnected")
    with suppress(ConnectionResetError):
        while peer.recv(65536):
            pass
    assert station.events.pop("disconnected") == 1
    assert station.events == ({f"refused:{reason}": 1} if reason else {})
    assert station.echoes(steady) == b"echo"


def test_a_stranger_and_a_replayed_frame_get_nowhere(
    keyed: Station, folder: Path, tmp_path: Path
) -> None:
    add_client(tmp_path, "stranger", ("feed", "read", "control"))
    own, server = key(tmp_path, "stranger"), key(folder, "rig").server
    stranger = ClientKey(name="rig", public=own.public, secret=own.secret, server=server)
    keyed.dealer(key=stranger).send(b"x")
    keyed.until("refused:key")
    keyed.dealer(key=key(tmp_path, "stranger")).send(b"x")  # takes it for another service
    keyed.until("refused:handshake")
    # a go-between that repeats a frame it cannot read
    between = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{between.getsockname()[1]}"
    client = keyed.dealer(key=key(folder, "rig"), address=address)
    near, _ = between.accept()
    far = keyed.raw()
    for end in (near, far):
        end.setblocking(False)
    client.send(b"x" * 500)
    end, last = time.monotonic() + WAIT_S, b""
    while not (came := keyed.turn()):
        assert time.monotonic() < end
        for one, other in ((near, far), (far, near)):
            try:
                data = one.recv(65536)
            except BlockingIOError:
                continue
            last = data if one is near else last
            other.sendall(data)
    assert came[0].message.body == b"x" * 500
    far.sendall(last)
    keyed.until("refused:message")
    near.close()
    between.close()


def test_who_is_revoked_is_nobody_at_once_and_expelled_from_where_it_may_not_be(
    keyed: Station, folder: Path
) -> None:
    assert keyed.gate is not None
    gone, rig = (keyed.dealer(key=key(folder, name)) for name in ("gone", "rig"))
    gone.send(b"one")
    (before,) = keyed.comes()
    assert keyed.echoes(rig) == b"echo"
    assert keyed.connections.user(before.owner) == "gone"
    revoke_client(folder, "gone")
    assert keyed.gate.refresh()
    assert keyed.connections.user(before.owner) == ""
    keyed.connections.expel("results")
    assert keyed.echoes(rig) == b"echo"
    keyed.connections.expel("ingest")
    keyed.until("refused:key")
    assert keyed.echoes(rig) == b"echo"


# ---- limits ------------------------------------------------------------------------------------


def test_who_does_not_read_is_owed_so_many_bytes_and_no_more(station: Station) -> None:
    deaf = station.raw(GREETING, ready(), frame(b"hello"))
    (hello,) = station.comes()
    body = b"x" * 1000
    sent = 0
    while station.connections.reply(hello.owner, body):
        station.connections.flush()
        sent += 1
        assert sent * len(body) < 64 << 20
    assert station.connections.full(hello.owner)
    for _ in range(100):
        assert not station.connections.reply(hello.owner, body)
    steady = station.dealer()
    assert station.echoes(steady) == b"echo"
    got = b""
    while len(got) < sent * len(body):  # and what it is owed it is given, whole and in order
        got += deaf.recv(1 << 20)
        station.turn(0.0)
    assert got.endswith(frame(body) * (sent - 1))
    assert station.connections.reply(hello.owner, body)


def test_a_turn_reads_so_many_frames_whoever_sent_them(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that are no message, such as pings, too; a peer among many waits for a few each."""
    for _ in range(100):
        station.raw(GREETING, ready(), frame(b"\x04PING\x00\x0a", 4) * 100, frame(b"done"))
    read: list[int] = []
    parse = Peer.parse

    def counted(self: Peer, most: int, came: list[Incoming]) -> None:
        read.append(most)
        parse(self, most, came)

    monkeypatch.setattr(Peer, "parse", counted)
    end, done = time.monotonic() + WAIT_S, 0
    while done < 100:
        assert time.monotonic() < end
        read.clear()
        done += len(station.turn(0.0))
        assert sum(read) <= 512


def test_strangers_who_say_nothing_do_not_keep_others_out(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station.connections, "_most", 8)
    held = station.dealer()
    assert station.echoes(held) == b"echo"
    for _ in range(30):
        station.raw(GREETING[:20])
    station.until("refused:connections", 20)
    assert station.echoes(station.dealer()) == b"echo"
    assert station.echoes(held) == b"echo"


def test_one_user_does_not_take_all_connections(
    keyed: Station, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed.connections, "_most", 16)
    for _ in range(4):
        assert keyed.echoes(keyed.dealer(key=key(folder, "reader"))) == b"echo"
    for _ in range(3):
        keyed.dealer(key=key(folder, "reader"))
    keyed.until("refused:connections", 3)
    assert keyed.echoes(keyed.dealer(key=key(folder, "rig"))) == b"echo"


# ---- any bytes at all --------------------------------------------------------------------------

WHOLE = (
    GREETING,
    ready(identity=b"abc"),
    frame(b"hello"),
    frame(b"\x04PING\x00\x0actx", 4),
    frame(b"a", 1) + frame(b"b"),
    frame(b"x" * 300),
    frame(b"\x09SUBSCRIBEabc", 4),
)
STREAM = b"".join(WHOLE)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """What a peer might send: parts repeated, left out, changed; then any bytes."""
    parts = draw(st.lists(st.sampled_from(WHOLE), max_size=6))
    data = bytearray(b"".join(parts) if draw(st.booleans()) else STREAM)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=4)):
        if data:
            data[at % len(data)] = byte
    return bytes(data) + draw(st.binary(max_size=80))


@pytest.mark.chaos
def test_any_bytes_are_messages_or_end_their_connection_alone() -> None:
    station = Station()
    try:
        steady = station.dealer()
        seen = 0

        @settings(max_examples=5_000 if FULL else 300, deadline=None, database=None)
        @given(data=streams(), cut=st.integers(0, 700))
        def send(data: bytes, cut: int) -> None:
            nonlocal seen
            raw = station.raw(data[:cut])
            station.turn(0.0)
            raw.sendall(data[cut:]) if len(data) > cut else None
            raw.close()
            station.raws.remove(raw)
            seen += 1
            station.until("disconnected", seen)
            assert station.echoes(steady, data[:LIMIT]) == data[:LIMIT]

        send()
        allowed = {"disconnected", "refused:handshake", "refused:message"}
        assert set(station.events) <= allowed
        assert seen >= (5_000 if FULL else 300)
    finally:
        station.close()
