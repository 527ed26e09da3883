"""The service: the only sockets, and the thread that owns them.

The I/O thread binds ROUTER (feeders and requests) and XPUB (results), stamps every message as it
takes it off the socket, and keeps the session table. The solver thread runs the engine. They meet
in a queue each way; an inproc PAIR wakes the I/O thread. Nothing in a message, and nothing that a
solve raises, ends either of them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import zmq

from ilqr_service import logs
from ilqr_service.engine import Engine
from ilqr_service.publisher import Publisher
from ilqr_service.session import Effects, Limits
from ilqr_service.sessions import SessionTable
from ilqr_service.settings import ServiceSettings, loopback_endpoint
from ilqr_service.solver import SolverThread
from ilqr_service.telemetry import Telemetry
from ilqr_service.web import Web
from ilqr_service.work import FAILED
from ilqr_vae import wire
from ilqr_vae.errors import ProtocolError, ServiceError

_POLL_MS = 100
_BURST = 256
_WAKE = "inproc://wake"
_LINGER_MS = 500
_STALL_S = 5.0
_TROUBLE = ("stalled", "not_finite")


class Service:
    """A model being served.

    Args:
        engine: the loaded model.
        settings: addresses and limits.

    Attributes:
        ingest, results, http: the addresses in use, once started.
        model, device: the model's id and where it computes.
        ended: set when the service has stopped, by itself or not.
        failure: what ended it, if something did.
    """

    def __init__(self, engine: Engine, settings: ServiceSettings) -> None:
        self.ingest = self.results = self.http = ""
        self.model = engine.facts.model
        self.device = str(engine.device)
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.telemetry = Telemetry(engine.facts.bin_width_ns / 1e9)
        self._engine = engine
        self._settings = settings
        limits = Limits(
            credits=settings.credits,
            gap_limit=settings.gap_limit,
            max_sessions=settings.max_sessions,
            deadline_ns=round(settings.deadline_ms * 1e6) or engine.facts.bin_width_ns,
            idle_ns=round(settings.idle_s * 1e9),
        )
        self._table = SessionTable(engine.facts, limits)
        self._table.drain("still warming up")
        self._context: zmq.Context[Any] = zmq.Context()
        self._solver = SolverThread(engine, self._context, _WAKE)
        self._stop = threading.Event()
        self._seen = time.monotonic()
        self._web: Web | None = None
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)

    # ---- from any thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Bind everything and begin warming up.

        Raises:
            ServiceError: an address is wrong, in use, or beyond loopback. Nothing is left bound.
        """
        try:
            self._router = self._bind_router()
            self._publisher = Publisher(
                self._context,
                queue=self._settings.results_queue,
                topics=2 * self._settings.max_sessions,
            )
            self.results = _bind("results", self._publisher.socket, self._settings.results)
            self._wake: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
            self._wake.bind(_WAKE)
            if self._settings.http:
                self._web = Web(
                    self._settings.http,
                    self.telemetry.registry,
                    healthy=lambda: self.healthy,
                    ready=lambda: self.ready,
                )
                self.http = self._web.address
        except ServiceError:
            self._context.destroy(linger=0)
            raise
        self._solver.start()
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Bins are answered."""
        return self._solver.ready.is_set() and self.healthy and not self._stop.is_set()

    @property
    def healthy(self) -> bool:
        """Both threads are alive and the I/O thread is not stuck."""
        failed = self.failure or self._solver.failure or self.ended.is_set()
        return not failed and time.monotonic() - self._seen < _STALL_S

    def wait_ready(self, timeout: float) -> bool:
        """Wait until bins are answered; False after ``timeout`` seconds."""
        return self._solver.ready.wait(timeout) and self.ready

    def stop(self) -> None:
        """Answer what is queued (for at most ``drain_s``), end the sessions, free the addresses."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._web is not None:
            self._web.close()
        self.telemetry.ready(False)

    # ---- the I/O thread ------------------------------------------------------------------------

    def _bind_router(self) -> zmq.Socket[bytes]:
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        router.maxmsgsize = self._settings.max_message_bytes
        router.rcvhwm = router.sndhwm = 10_000
        # Say so when a reply's feeder is gone, rather than dropping the reply silently.
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.ingest = _bind("ingest", router, self._settings.ingest)
        return router

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failure = error
            logs.exception("the I/O thread ended")
        finally:
            self._solver.stop()
            self._context.destroy(linger=_LINGER_MS)
            self.failure = self.failure or self._solver.failure
            self.ended.set()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._wake, self._router, self._publisher.socket):
            poller.register(socket, zmq.POLLIN)
        drained_by: int | None = None
        ticked = 0
        while self._solver.failure is None:
            events = dict(poller.poll(_POLL_MS))
            now = time.monotonic_ns()
            self._seen = now / 1e9
            if self._wake in events:
                _empty(self._wake)
            self._answers()
            if self._publisher.socket in events:
                self._publisher.welcome()
            if self._router in events:
                self._messages()
            for owner, credit in self._table.credits():
                self._reply(owner, credit)
            if not self._table.accepting and self._solver.ready.is_set() and drained_by is None:
                self._table.accepting = True
                self.telemetry.ready(True)
            if now - ticked > _POLL_MS * 1_000_000:
                ticked = now
                self._carry_out(self._table.tick(now))
                self.telemetry.gauge(sessions=len(self._table), queued=self._table.waiting)
            if self._stop.is_set():
                if drained_by is None:
                    self._table.drain("shutting down")
                    self.telemetry.ready(False)
                    drained_by = now + round(self._settings.drain_s * 1e9)
                if self._table.waiting == 0 or now > drained_by:
                    break
        self._carry_out(self._table.end_all("shutdown"))

    def _answers(self) -> None:
        answers = self._solver.finished()
        while answers:
            answer = answers.popleft()
            if answer.solver == FAILED:
                self.telemetry.count(Counter({"solve_failed": 1}))
            elif answer.solver in _TROUBLE:
                self.telemetry.count(Counter({"non_converged": 1}))
            self._carry_out(self._table.answered(answer, time.monotonic_ns()))

    def _messages(self) -> None:
        """Take what has come, each stamped as it is taken, then handle it; answers go first."""
        came: list[tuple[bytes, list[bytes], int]] = []
        while len(came) < _BURST:
            try:
                owner, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            came.append((owner, frames, time.monotonic_ns()))
        for owner, frames, received in came:
            self._answers()
            try:
                self._message(owner, frames, received)
            except ProtocolError as error:
                self._carry_out(self._table.refuse(owner, error))
            except Exception:
                logs.exception("a message could not be handled")
                error = ProtocolError("internal", expected="a message that can be handled", got="")
                self._carry_out(self._table.refuse(owner, error))

    def _message(self, owner: bytes, frames: list[bytes], received: int) -> None:
        if len(frames) != 1:
            raise ProtocolError("frames", expected="1 frame", got=f"{len(frames)} frames")
        message = wire.decode_upstream(frames[0])
        match message:
            case wire.Open() | wire.Bin() | wire.Close():
                self._carry_out(self._table.receive(owner, message, received))
            case wire.Probe():
                probed = wire.Probed(client_ns=message.client_ns, service_ns=received)
                self._reply(owner, probed)
            case wire.Sessions():
                self._reply(owner, wire.SessionList(sessions=self._table.infos(received)))
            case wire.Describe():
                self._reply(
                    owner,
                    wire.Described(
                        protocol=wire.PROTOCOL,
                        model=self.model,
                        ready=self.ready,
                        device=self.device,
                        results=self.results,
                        manifest=self._engine.manifest,
                    ),
                )

    def _carry_out(self, effects: Effects) -> None:
        for run in effects.forget:
            if dropped := self._solver.forget(run):
                effects.events["dropped"] += dropped
        if effects.work:
            self._solver.submit(effects.work)
        for message in effects.published:
            self._publisher.publish(message)
        for owner, reply in effects.replies:
            self._reply(owner, reply)
        for message in effects.published:
            if isinstance(message, wire.Result):
                self.telemetry.observe(message)
        self.telemetry.count(effects.events)

    def _reply(self, owner: bytes, message: wire.Message) -> None:
        try:
            self._router.send_multipart([owner, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            # EHOSTUNREACH: gone. EAGAIN: it does not read. Either way it is the feeder's loss.
            self.telemetry.count(Counter({"unreachable": 1}))


def _bind(field: str, socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind with heartbeats; returns the address with its port."""
    address = loopback_endpoint(field, endpoint)
    if address.startswith("tcp://["):
        socket.ipv6 = True
    socket.heartbeat_ivl = 2_000
    socket.heartbeat_timeout = 10_000
    socket.heartbeat_ttl = 10_000
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ServiceError(
            field, expected="an address that can be bound", got=f"{endpoint} ({error})"
        ) from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\x00")


def _empty(socket: zmq.Socket[bytes]) -> None:
    while True:
        try:
            socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
