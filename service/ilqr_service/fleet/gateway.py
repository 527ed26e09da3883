"""The address of a fleet: redirects clients to servers, and forwards requests to all servers.

Bins and answers do not pass through it. The exception are subscribers at its own results address:
it subscribes to their topics at every server.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import zmq
from msgspec.structs import replace

from ilqr_service import logs
from ilqr_service.fleet.member import Server
from ilqr_service.fleet.rolling import Rolling, Served, models_of
from ilqr_service.settings import ServiceSettings, loopback_endpoint
from ilqr_service.transport.connections import Connections, Received
from ilqr_service.transport.results import Publisher
from ilqr_service.transport.security import Gate
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import this_clock
from ilqr_vae.protocol.keys import ClientKey

_POLL_S = 0.02
_ASK_S, _LOAD_S = 0.5, 120.0
_OPENING_S = 5.0
_LOOK_S = 0.25
_BYTES, _REPLIES = 1 << 20, 10_000
Reply = TypeVar("Reply", bound=messages.Message)


class _Home(NamedTuple):
    """Location of a session: server, time of the redirect, and the client's connection if any."""

    server: str
    at: float
    epoch: int
    owner: bytes


class Gateway:
    """Binds the addresses of the fleet. Its thread owns all sockets.

    Args:
        settings: addresses and keys.
        key: key of a user with all roles, to connect to servers that require keys.
        servers: returns the servers that answer.
        place: returns the server for a new session, given the number of sessions by server. Raises
            ProtocolError if all are full.
        took_up: returns the downtime of recently taken-over servers by name.
        missing: returns whether servers are being taken over.
        served: called with the models of a server after a change, and the loaded file.
        size: lock held while models are changed, so that no server is added meanwhile.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        key: ClientKey | None,
        *,
        servers: Callable[[], list[Server]],
        place: Callable[[Counter[str]], Server],
        took_up: Callable[[str], int],
        missing: Callable[[], bool],
        served: Served,
        size: AbstractContextManager[object],
    ) -> None:
        self._settings, self._key = settings, key
        self._servers, self._place, self._took_up = servers, place, took_up
        self._missing = missing
        self._gate = Gate(Path(settings.keys)) if settings.keys else None
        self._connections = Connections(self._gate)
        self._publisher = Publisher(
            self._connections, queue=settings.results_queue, topics=settings.max_sessions
        )
        self._context: zmq.Context[Any] = zmq.Context()
        self._sub = self._socket(zmq.SUB)
        self._heard: dict[str, Server] = {}
        self._topics: set[bytes] = set()
        self._homes: dict[str, _Home] = {}
        self._lock = threading.Lock()
        self._rolling = Rolling(
            lambda server, message: self._ask(server, message, messages.ModelList, _LOAD_S),
            servers,
            served,
            size,
        )
        self._news: SimpleQueue[tuple[str, bool]] = SimpleQueue()
        self._stop = threading.Event()
        self.ingest = self._bind("ingest", settings.ingest)
        results = loopback_endpoint("results", settings.results, secured=self._gate is not None)
        self.results = self._publisher.listen(results).address
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the addresses."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._connections.close()
        self._context.destroy(linger=0)

    def announce(self, name: str) -> None:
        """Redirect the clients of a server to its new address. Thread-safe."""
        self._news.put((name, True))

    def forget(self, name: str) -> None:
        """Drop the sessions of a server, which cannot be taken over. Thread-safe."""
        self._news.put((name, False))

    def infos(self) -> list[tuple[Server, messages.SessionInfo]]:
        """Return the open sessions of all servers that answer, with their servers. Thread-safe."""
        asked = self._ask_all(messages.Sessions(), messages.SessionList)
        found = [(server, info) for server, listed in asked for info in listed.sessions]
        answered, now = {server.name for server, _ in asked}, time.monotonic()
        with self._lock:
            kept = {
                session: home
                for session, home in self._homes.items()
                if home.server not in answered or now - home.at < _OPENING_S
            }
            for server, info in found:
                before = self._homes.get(info.session)
                owner = b"" if before is None else before.owner
                kept[info.session] = _Home(server.name, 0.0, info.epoch, owner)
            self._homes = kept
        return found

    # ---- its thread ----------------------------------------------------------------------------

    def _bind(self, name: str, endpoint: str) -> str:
        address = loopback_endpoint(name, endpoint, secured=self._gate is not None)
        return self._connections.listen(
            name,
            address,
            b"ROUTER",
            frozenset((b"DEALER", b"REQ", b"ROUTER")),
            message_bytes=self._settings.max_message_bytes,
            backlog_bytes=_BYTES,
            backlog=_REPLIES,
        ).address

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.linger = 0
        if self._key is not None:
            self._key.apply(socket)
        return socket

    def _run(self) -> None:
        while not self._stop.is_set():
            for received in self._connections.poll(_POLL_S):
                self._handle(received)
            self._relay()
            for owner, reply in self._rolling.done():
                self._reply(owner, reply)
            while not self._news.empty():
                self._tell(*self._news.get())
            self._connections.tidy()
            if self._gate is not None and self._gate.refresh():
                self._connections.expel("results")

    def _relay(self) -> None:
        """Update connections and subscriptions, and forward messages."""
        servers = {server.name: server for server in self._servers()}
        for name, server in list(self._heard.items()):
            if servers.get(name) != server:
                self._sub.disconnect(server.results)
                del self._heard[name]
        for name, server in servers.items():
            if name not in self._heard:
                self._sub.connect(server.results)
                self._heard[name] = server
        wanted = self._publisher.wanted
        for topic in wanted - self._topics:
            self._sub.setsockopt(zmq.SUBSCRIBE, topic)
        for topic in self._topics - wanted:
            self._sub.setsockopt(zmq.UNSUBSCRIBE, topic)
        self._topics = wanted
        while self._sub.poll(0):
            topic, frame = self._sub.recv_multipart()
            message = messages.decode_published(frame)
            if isinstance(message, messages.Notice) and message.what == "subscribed":
                continue  # each server sends one; the gateway has sent its own
            exact = not isinstance(message, messages.Notice | messages.Result)
            self._publisher.publish(topic, frame, exact=exact)

    def _reply(self, owner: bytes, message: messages.Message) -> None:
        self._connections.reply(owner, messages.encode(message))

    def _handle(self, received: Received) -> None:
        owner, incoming, at_ns = received
        session, index = "", -1
        try:
            if incoming.parts != 1:
                raise ProtocolError("frames", expected="1 frame", got=f"{incoming.parts} frames")
            message = messages.decode_upstream(incoming.body)
            session = getattr(message, "session", "")
            index = -1 if isinstance(message, messages.Open) else getattr(message, "index", -1)
            if self._gate is not None:
                self._gate.check(self._connections.user(owner), message)
            reply = self._answer(owner, message, at_ns)
        except ProtocolError as error:
            reply = messages.Refused(
                field=error.field,
                expected=error.expected,
                got=error.got,
                session=session,
                index=index,
            )
        except Exception:
            logs.exception("a message could not be handled")
            reply = messages.Refused(
                field="internal", expected="a message that can be handled", got=""
            )
        if reply is not None:
            self._reply(owner, reply)

    def _answer(
        self, owner: bytes, message: messages.Upstream, at_ns: int
    ) -> messages.Message | None:
        match message:
            case messages.Open():
                return self._open(owner, message)
            case messages.Describe():
                (_, described), *_ = self._some(message, messages.Described)
                return replace(described, results=self.results)
            case messages.Sessions():
                return messages.SessionList(sessions=tuple(info for _, info in self.infos()))
            case messages.Probe():
                return messages.Probed(
                    client_ns=message.client_ns, service_ns=at_ns, clock=this_clock()
                )
            case messages.Models():
                return models_of(listed for _, listed in self._some(message, messages.ModelList))
            case messages.Load() | messages.Swap() | messages.Rollback():
                self._check_all_there()
                self._rolling.begin(owner, message)
                return None
            case messages.Event():
                server = self._where(message.session)
                if server is None:
                    raise ProtocolError("session", expected="an open session", got=message.session)
                return self._ask(server, message, messages.Noted)
            case _:
                raise ProtocolError(
                    "address",
                    expected="bins at the address of the session's server, as moved says",
                    got=f"a {type(message).__name__.lower()} at the fleet's",
                )

    def _open(self, owner: bytes, message: messages.Open) -> messages.Moved:
        server = self._where(message.session)
        if not message.follow:
            there = server or next(iter(self._servers()), None)
            raise ProtocolError(
                "follow",
                expected="a client that follows to its session's server"
                + (f", such as {there.ingest}" if there else ""),
                got="one that does not say so",
            )
        if server is None:
            self._check_all_there()
            if message.resume and not message.begin:
                raise ProtocolError("session", expected="an open session", got=message.session)
            with self._lock:
                sessions = Counter(home.server for home in self._homes.values())
            server = self._place(sessions)
        with self._lock:
            before = self._homes.get(message.session)
            at = time.monotonic() if before is None or not message.resume else before.at
            self._homes[message.session] = _Home(server.name, at, message.epoch, owner)
        down_ns = self._took_up(server.name) if message.resume else 0
        return _moved(message.session, message.epoch, server, down_ns)

    def _check_all_there(self) -> None:
        """Raises ProtocolError: a server died, and its sessions are being taken up."""
        if self._missing():
            raise ProtocolError(
                "service", expected="ready", got="sessions of a server that died are taken up"
            )

    def _tell(self, name: str, there: bool) -> None:
        """Redirect the clients of a server to its current address, or drop its sessions."""
        server = next((s for s in self._servers() if s.name == name), None)
        with self._lock:
            homes = {session: h for session, h in self._homes.items() if h.server == name}
            if not there:
                for session in homes:
                    del self._homes[session]
                return
        for session, home in homes.items():
            if server is not None and home.owner:
                moved = _moved(session, home.epoch, server, self._took_up(name))
                self._reply(home.owner, moved)

    def _where(self, session: str) -> Server | None:
        """Return the server that has the session, or to which it was just redirected.

        Raises ProtocolError if it died and no other one has taken over yet.
        """
        if session not in self._homes:
            self.infos()  # opened directly at a server
        home = self._homes.get(session)
        if home is None:
            return None
        for server in self._servers():
            if server.name == home.server:
                return server
        raise ProtocolError("service", expected="ready", got="the session is being taken up")

    # ---- the servers ---------------------------------------------------------------------------

    def _ask(
        self, server: Server, message: messages.Message, kind: type[Reply], limit: float = _ASK_S
    ) -> Reply:
        """Ask one server. Raises ProtocolError if it refuses or does not answer."""
        for _, reply in self._ask_all(message, kind, [server], limit):
            return reply
        raise ProtocolError("service", expected="an answer", got=f"none of {server.name}")

    def _some(self, message: messages.Message, kind: type[Reply]) -> list[tuple[Server, Reply]]:
        if found := self._ask_all(message, kind):
            return found
        raise ProtocolError("service", expected="ready", got="no server that answers")

    def _ask_all(
        self,
        message: messages.Message,
        kind: type[Reply],
        servers: list[Server] | None = None,
        limit: float = _ASK_S,
    ) -> list[tuple[Server, Reply]]:
        """Ask servers; return the answers that come in time. Raises ProtocolError if refused."""
        sockets: dict[Any, Server] = {}
        found: list[tuple[Server, Reply]] = []
        poller, end = zmq.Poller(), time.monotonic() + limit
        try:
            for server in self._servers() if servers is None else servers:
                socket = self._socket(zmq.DEALER)
                socket.connect(server.ingest)
                socket.send(messages.encode(message))
                poller.register(socket, zmq.POLLIN)
                sockets[socket] = server
            waiting = set(sockets)
            while waiting and (left := end - time.monotonic()) > 0:
                came = poller.poll(max(1, int(min(left, _LOOK_S) * 1e3)))
                if not came:  # nobody waits for a server that died
                    alive = self._servers()
                    waiting = {socket for socket in waiting if sockets[socket] in alive}
                for socket, _ in came:
                    reply = messages.decode_downstream(socket.recv())
                    if isinstance(reply, kind):
                        found.append((sockets[socket], reply))
                        waiting.discard(socket)
                    elif isinstance(reply, messages.Refused):
                        raise ProtocolError(reply.field, expected=reply.expected, got=reply.got)
            return found
        finally:
            for socket in sockets:
                socket.close()


def _moved(session: str, epoch: int, server: Server, down_ns: int) -> messages.Moved:
    return messages.Moved(
        session=session,
        epoch=epoch,
        ingest=server.ingest,
        results=server.results,
        down_ns=down_ns,
    )
