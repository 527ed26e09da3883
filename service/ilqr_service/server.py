"""The service: its sockets, and the thread that owns them.

The I/O thread binds the ingest and results addresses, timestamps each message as it is read, and
owns the session table. The solver thread runs the engine. They communicate by one queue in each
direction. No message and no error in a solve ends either thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from ilqr_service import logs
from ilqr_service.control import Control
from ilqr_service.hygiene import Hygiene
from ilqr_service.journal.journal import Find, Journal
from ilqr_service.journal.writer import Copy
from ilqr_service.metrics.telemetry import Telemetry
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits
from ilqr_service.sessions.table import SessionTable
from ilqr_service.settings import ServiceSettings, loopback_endpoint
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines
from ilqr_service.solving.run import PackedRun
from ilqr_service.solving.slots import Slots
from ilqr_service.solving.thread import SolverThread
from ilqr_service.telling import Teller
from ilqr_service.transport.connections import Connections, Received
from ilqr_service.transport.http import Web
from ilqr_service.transport.results import Publisher
from ilqr_service.transport.security import Gate
from ilqr_service.transport.zmtp import Incoming
from ilqr_service.work import Work
from ilqr_vae.errors import ProtocolError, ServiceError
from ilqr_vae.protocol import messages

_POLL_S = 0.1
_HELD_S = 0.001  # while answers wait for the journal's copy
_TOGETHER = 16  # messages or answers that are journalled and passed to the solver together
_ANSWERS = 64  # handled before the next messages
_LINGER_S = 0.5
_REPLIES_BYTES = 1 << 20  # replies kept for a peer that does not read
_REPLIES = 10_000
_HELD_UP_S = 0.5
_STALL_S = 5.0


class Service:
    """A running service.

    Args:
        engine: engine of the first slot, for sessions that name no model.
        settings: addresses and limits.
        more: engines of further slots by name.
        hygiene: settings applied to the threads.
        find: returns an engine by model id, for open sessions of the journal whose model is in no
            slot.
        copy: copy of the journal on another node.

    Attributes:
        ingest, results, http: bound addresses, once started.
        model, device: id of the first model, and its device.
        ended: set when the service has stopped for any reason.
        failure: the error that ended it, if any.

    Raises:
        ConfigError: the keys cannot be read.
        JournalError: the journal cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServiceSettings,
        *,
        more: dict[str, Engine] | None = None,
        folder: Path | None = None,
        hygiene: Hygiene | None = None,
        find: Find | None = None,
        copy: Copy | None = None,
    ) -> None:
        self.ingest = self.results = self.http = ""
        self.model = engine.model_info.model
        self.device = str(engine.device)
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.telemetry = Telemetry(engine.model_info.bin_width_ns / 1e9)
        self._settings = settings
        limits = Limits.of(settings)
        self._table = SessionTable(engine.model_info, limits, reaches=self._reply)
        slots = {"main": engine} | (more or {})
        engines = Engines(engine)
        for name, other in slots.items():
            engines.engines[other.model_info.model] = other
            self._table.slots[name] = other.model_info
        self._table.drain("still warming up")
        self._slots = Slots(
            slots, engines, self._table, settings, Path(settings.models or folder or ".")
        )
        self._hygiene = hygiene or Hygiene(settings)
        self.telemetry.registry.register(self._hygiene.metrics)
        self._gate = Gate(Path(settings.keys)) if settings.keys else None
        self._journal = Journal(settings, slots, engines, self._table, find, copy)
        self._connections = Connections(self._gate)
        self._publisher = Publisher(
            self._connections, queue=settings.results_queue, topics=4 * settings.max_sessions
        )
        self._teller = Teller(self._journal, self._publisher, self._reply, self.telemetry)
        self._control = Control(
            self._table, self._slots, self._journal, settings.control_rate, self._described
        )
        self._solver = SolverThread(
            engines,
            self._connections.wake,
            resume=self._journal.resumed,
            snapshot_every=settings.snapshot_every if settings.journal else 0,
            keep_warm_s=settings.keep_warm_ms / 1e3,
            prepare=self._hygiene.thread,
        )
        self._stop, self._accepting = threading.Event(), threading.Event()
        self._seen, self._leave = time.monotonic(), False
        self._web: Web | None = None
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)

    # ---- from any thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Bind the addresses and start to warm up.

        Raises:
            ServiceError: an address is invalid, in use, or beyond loopback. Nothing stays bound.
        """
        try:
            self._journal.start()
            self.ingest = self._listen_for_feeders()
            results = self._address("results", self._settings.results)
            self.results = self._publisher.listen(results).address
            for result in self._journal.last:
                self._publisher.remember(messages.topic_of(result), messages.encode(result))
            if self._settings.http:
                self._web = Web(
                    self._settings.http,
                    self.telemetry.registry,
                    healthy=lambda: self.healthy,
                    ready=lambda: self.ready,
                )
                self.http = self._web.address
        except ServiceError:
            self._journal.close()
            self._connections.close()
            raise
        self._solver.start()
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether bins are answered."""
        return self._accepting.is_set() and self.healthy and not self._stop.is_set()

    @property
    def warming(self) -> bool:
        """Whether the service is warming up and has accepted nothing yet."""
        return not self._accepting.is_set()

    @property
    def healthy(self) -> bool:
        """Whether both threads are alive and the I/O thread is not stuck."""
        failed = self.failure or self._solver.failure or self.ended.is_set()
        return not failed and time.monotonic() - self._seen < _STALL_S

    def wait_ready(self, timeout: float) -> bool:
        """Wait until bins are answered; return False after ``timeout`` seconds."""
        return self._accepting.wait(timeout) and self.ready

    def stop(self, *, leave: bool = False) -> None:
        """Answer queued bins (for at most ``drain_s``), end the sessions, free the addresses.

        Args:
            leave: leave the sessions open in the journal, for another service to resume.
        """
        self._leave = leave
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._web is not None:
            self._web.close()
        self.telemetry.ready(False)

    # ---- the I/O thread ------------------------------------------------------------------------

    def _address(self, field: str, endpoint: str) -> str:
        return loopback_endpoint(field, endpoint, secured=self._gate is not None)

    def _listen_for_feeders(self) -> str:
        door = self._connections.listen(
            "ingest",
            self._address("ingest", self._settings.ingest),
            b"ROUTER",
            frozenset((b"DEALER", b"REQ", b"ROUTER")),
            message_bytes=self._settings.max_message_bytes,
            backlog_bytes=_REPLIES_BYTES,
            backlog=_REPLIES,
        )
        return door.address

    def _run(self) -> None:
        try:
            self._hygiene.thread()
            self._serve()
        except BaseException as error:
            self.failure = error
            logs.exception("the I/O thread ended")
        finally:
            self._solver.stop()
            self._journal.close()
            self._connections.close(_LINGER_S)
            self.failure = self.failure or self._solver.failure
            self.ended.set()

    def _serve(self) -> None:
        drained_by: int | None = None
        ticked = resume = 0
        due: int | None = None
        while self._solver.failure is None:
            came = self._connections.poll(_HELD_S if self._teller.holding else _patience_s(due))
            now = time.monotonic_ns()
            if now / 1e9 - self._seen > _HELD_UP_S:  # first read messages that arrived meanwhile
                ticked, resume = now, now + round(_POLL_S * 1e9)
            self._seen = now / 1e9
            self._teller.go_on()
            self._answers()
            self._messages(came)
            if not self._table.accepting and self._solver.ready.is_set() and drained_by is None:
                self._table.accepting = True
                self._accepting.set()
                self.telemetry.ready(True)
            if (due := self._table.next_due()) is not None:
                due = max(due, resume)
            self._credits(all_owed=False)
            if now - ticked > _POLL_S * 1e9 or (due is not None and due <= now):
                ticked = now
                self._noted(self._table.tick(now))
                self._noted(self._slots.loaded())
                self._credits()
                self._housekeeping()
                due = self._table.next_due()
            if self._stop.is_set():
                if drained_by is None:
                    self._table.drain("shutting down")
                    self.telemetry.ready(False)
                    drained_by = now + round(self._settings.drain_s * 1e9)
                if (self._table.waiting == 0 and not self._teller.holding) or now > drained_by:
                    break
        if self._solver.failure is None and not self._leave:
            self._noted(self._table.end_all("shutdown"))

    def _credits(self, *, all_owed: bool = True) -> None:
        for owner, credit in self._table.credits(all_owed=all_owed):
            self._reply(owner, credit)

    def _housekeeping(self) -> None:
        """Do periodic work, ten times a second."""
        waiting = self._table.waiting
        self.telemetry.gauge(sessions=len(self._table), queued=waiting)
        self.telemetry.masked(sum(len(s.flagged) for s in self._table))
        self.telemetry.journal(self._journal.ok, self._journal.lost, self._journal.written)
        self._connections.tidy()
        self.telemetry.count(self._connections.events() + self._publisher.strange())
        self._journal.flush()
        self.telemetry.settle()
        if self._gate is not None and self._gate.refresh():
            self._connections.expel("results")
        self._hygiene.collect(idle=waiting == 0)

    def _answers(self) -> None:
        answers = self._solver.finished()
        step: list[Effects] = []
        for _ in range(min(_ANSWERS, len(answers))):
            answer = answers.popleft()
            if isinstance(answer, PackedRun):
                self._journal.keep(answer)
                continue
            effects = self._table.answered(answer, time.monotonic_ns())
            self._journal.note(effects, answer)
            step.append(effects)
            if len(step) == _TOGETHER:
                self._carry_out(step)
                step = []
        self._carry_out(step)
        if answers:  # the next turn must not wait for anything else
            self._connections.wake()

    def _messages(self, came: list[Received]) -> None:
        """Handle messages; answers have priority."""
        for first in range(0, len(came), _TOGETHER):
            self._answers()
            step: list[Effects] = []
            for received in came[first : first + _TOGETHER]:
                step.append(self._handled(received))
                self._journal.note(step[-1], None)
            self._carry_out(step)

    def _handled(self, received: Received) -> Effects:
        owner = received.owner
        try:
            return self._message(*received)
        except ProtocolError as error:
            return Effects.refusal(owner, error)
        except Exception:
            logs.exception("a message could not be handled")
            error = ProtocolError("internal", expected="a message that can be handled", got="")
            return Effects.refusal(owner, error)

    def _message(self, owner: bytes, incoming: Incoming, at_ns: int) -> Effects:
        if incoming.parts != 1:
            raise ProtocolError("frames", expected="1 frame", got=f"{incoming.parts} frames")
        limit = self._settings.max_message_bytes
        if incoming.size > limit:
            raise ProtocolError("size", expected=f"{limit} bytes", got=f"{incoming.size}")
        message = messages.decode_upstream(incoming.body)
        user = ""
        if self._gate is not None:
            user = self._connections.user(owner)
            self._gate.check(user, message)
        if isinstance(message, messages.Feed):
            effects = self._table.receive(owner, message, at_ns, user)
            if isinstance(message, messages.Open):
                effects.name_ignored(messages.unknown_fields(incoming.body, message))
            return effects
        if not isinstance(message, messages.Control) and self._connections.full(owner):
            return Effects(events={"unreachable": 1})  # its reply would be dropped
        return self._control.answer(owner, user, message, incoming.body, at_ns)

    def _described(self) -> messages.Described:
        engine = next(iter(self._slots.slots.values())).serving
        return messages.Described(
            protocol=messages.PROTOCOL,
            model=engine.model_info.model,
            ready=self.ready,
            device=self.device,
            results=self.results,
            manifest=engine.manifest,
        )

    def _noted(self, effects: Effects) -> None:
        """Carry out effects that no message or answer caused."""
        self._journal.note(effects, None)
        self._carry_out([effects])

    def _carry_out(self, steps: list[Effects]) -> None:
        """Carry out effects in order; they are journalled before they count."""
        if not steps:
            return
        self._journal.flush()
        works: list[Work] = []
        for effects in steps:
            for run in effects.forget:
                # drop also what it queued in this step
                mine = [work for work in works if work.run == run]
                works = [work for work in works if work.run != run]
                if dropped := len(mine) + self._solver.forget(run):
                    effects.events["dropped"] += dropped
            works += effects.work
        if works:
            self._solver.submit(works)
        for effects in steps:
            for run in effects.overran:
                self._solver.overran(run)
        self._teller.tell(steps)

    def _reply(self, owner: bytes, message: messages.Message) -> bool:
        """Send to a feeder; return False if it has no connection."""
        if not owner:
            return False
        if self._connections.reply(owner, messages.encode(message)):
            return True
        self.telemetry.count(Counter({"unreachable": 1}))
        return self._connections.connected(owner)  # it does not read


def _patience_s(due_ns: int | None) -> float:
    """Return how long to wait for a message before something is due."""
    if due_ns is None:
        return _POLL_S
    return min(_POLL_S, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
