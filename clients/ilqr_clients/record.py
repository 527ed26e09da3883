"""Records a session as NWB while it runs, from any machine that may read it.

Messages go into an append-only file beside the NWB file (``NAME.nwb.log``) at once, and from there
into NWB when the session ends. A recorder that is restarted with the same files continues where the
last one stopped.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from msgspec.structs import replace

from ilqr_clients.connection import Closing, reachable
from ilqr_clients.listener import Topic
from ilqr_clients.record_log import Heard, RecordedService, RecordLog
from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import ConfigError, ServiceError, SessionEnd, number_of
from ilqr_vae.protocol import messages
from ilqr_vae.report.decoded import About, Decoded, check_out, write_decoded

_TURN_S, _SILENCE_S, _REFRESH_S, _SHARE = 0.2, 2.0, 1.0, 0.1

Say = Callable[[str], None]


def log_of(out: Path) -> Path:
    """Return the path of the messages that a recorder of ``out`` stores as they come."""
    return out.with_name(out.name + ".log")


class Recorder(Closing):
    """Records the runs of one session.

    Args:
        endpoint: the service's address.
        session: the session's name; it need not be open yet.
        out: NWB file of the first run; later runs become NAME-2.nwb and so on.
        about: subject, experimenter and institution.
        follow: continue after the end of a run, and rewrite the file during a run: about once a
            second, or less often if writing takes more than 0.1 s.
        force: replace an existing file.
        say: receives a line for each event.

    Attributes:
        written: files written, with the number of bins of each.

    Raises:
        RecordingError: the path is not a .nwb file in an existing folder, or it exists.
        ServiceError: the service is not reachable.
    """

    def __init__(
        self,
        endpoint: str,
        session: str,
        out: Path,
        *,
        about: About | None = None,
        follow: bool = False,
        force: bool = False,
        say: Say = lambda _: None,
    ) -> None:
        check_out(out, force=True)  # it has a name
        log = log_of(out)
        check_out(out, force=force or log.exists())
        self._path = out
        self.written: dict[Path, int] = {}
        self._out, self._session, self._about = out, session, about or About()
        self._follow, self._force, self._say = follow, force, say
        self._service: RecordedService | None = None
        self._run: Decoded | None = None
        self._done_ns = self._newest_ns = 0
        self._dirty, self._refreshed, self._took = False, 0.0, 0.0
        self._failure, self._stale = "", False
        self._heard = time.monotonic()
        self._gone = False
        self._client = ServiceClient(endpoint)
        self._context: zmq.Context[Any] = zmq.Context()
        self._log: RecordLog | None = None
        try:
            self._log = RecordLog(log)
            self._take_up()  # first, so that it is written even if the service is gone
            described = self._client.describe()
            results = reachable(described.results, endpoint)
            self._topic = Topic(
                self._context, results, session, None, self._client.timer, events=True
            )
            self._know(described)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Write the messages so far, and close the sockets; the session continues."""
        try:
            if self._log is not None:
                self._finish()
                log, self._log = self._log, None
                log.close(remove=True)
        finally:
            self._client.close()
            self._context.destroy(linger=0)

    def run(self, stop: threading.Event) -> None:
        """Record until ``stop`` is set, or, without ``follow``, until a run has ended.

        Waits for a service that is gone.

        Raises:
            ConfigError, RecordingError: a file could not be written.
        """
        while not stop.is_set():
            came = self._topic.socket.poll(int(_TURN_S * 1e3))
            for message, _ in self._topic.take() if came else ():
                self._heard = time.monotonic()
                if message is not None and self._note(message) and not self._follow:
                    return
            if time.monotonic() - self._heard > _SILENCE_S:
                self._ask()
            assert self._log is not None
            self._log.sync()
            self._tell(self._log.failure)
            pause = max(_REFRESH_S, self._took / _SHARE)
            if self._follow and self._dirty and time.monotonic() - self._refreshed >= pause:
                self._refresh()

    # ---- what comes ----------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Continue from the log of an earlier recorder."""
        assert self._log is not None
        for record in self._log.read():
            if isinstance(record, RecordedService):
                self._service, self._path = record, Path(record.path)
            else:
                message = messages.decode_published(record.frame)
                if message is not None:
                    self._keep(message)
        if self._run is not None:
            self._say(
                f"goes on with {self._log.path.name}: {number_of(len(self._run.results), 'bin')}"
            )

    def _know(self, described: messages.Described) -> None:
        """Record the identity of the service, and its clock."""
        assert self._log is not None
        clock = self._client.clock()
        clock_ns, at_ns = self._client.timer.now_ns() + clock.offset_ns, time.time_ns()
        manifests = dict(self._service.manifests) if self._service is not None else {}
        manifests[described.model] = described.manifest
        endpoint = self._client.endpoint
        self._service = RecordedService(
            endpoint, self._session, at_ns, clock_ns, manifests, str(self._path)
        )
        self._log.add(self._service)
        if self._run is not None:
            self._run.manifests = manifests

    def _note(self, message: messages.Published) -> bool:
        """Process a message. Return whether a run has ended."""
        run = self._run
        if isinstance(message, messages.Detail):  # of an answer that is known
            return False
        if isinstance(message, messages.Notice):
            end = SessionEnd.of(message.what)
            if run is None or message.epoch != run.epoch or end is None:
                return False
            if end is SessionEnd.SHUTDOWN:  # with a journal it continues
                self._write()
                return False
            return self._finish(message.what)
        if isinstance(message, messages.Detail):
            return False
        ended = run is not None and self._is_of_another(run, message) and self._finish()
        if not ended or self._follow:
            assert self._log is not None
            self._log.add(Heard(messages.encode(message)))
            self._keep(message)
        return ended

    def _is_of_another(self, run: Decoded, message: messages.Result | messages.Event) -> bool:
        """Return whether a message belongs to a run that started after this one.

        A service that was restarted without a journal restarts its epochs.
        """
        if message.received_ns < self._newest_ns:
            return False
        if message.epoch != run.epoch:
            return True
        known = run.results.get(message.index)
        if known is None or isinstance(message, messages.Event):
            return False
        return known.revision >= message.revision and known.received_ns != message.received_ns

    def _keep(self, message: messages.Published) -> None:
        """Add an answer or an event to its run, which starts with the first one."""
        service = self._service
        if service is None or isinstance(message, messages.Notice | messages.Detail):
            return
        if message.received_ns <= self._done_ns:
            return
        if self._run is None:
            self._run = self._begin(message, service)
        if message.epoch != self._run.epoch:
            return
        self._run.add(message)
        self._newest_ns = max(self._newest_ns, message.received_ns)
        self._dirty = True
        if isinstance(message, messages.Result) and not self._run.units:
            self._name_units(self._run, message)

    def _begin(
        self, message: messages.Result | messages.Event, service: RecordedService
    ) -> Decoded:
        return Decoded(
            session=self._session,
            epoch=message.epoch,
            identifier=f"{self._session}-{message.epoch}-{message.received_ns}",
            units=(),
            bin_width_ns=0,
            at_ns=service.at_ns,
            clock_ns=service.clock_ns,
            manifests=service.manifests,
            texts={"service": {"endpoint": service.endpoint}},
        )

    def _name_units(self, run: Decoded, first: messages.Result) -> None:
        """Set unit names and bin width from the manifest of the model that answered."""
        manifests = list(run.manifests.values())
        info: dict[str, Any] = run.manifests.get(first.model) or manifests[-1]
        names, n_units = tuple(info["unit_names"]), first.rates.shape[0]
        run.units = names if len(names) == n_units else tuple(f"unit{k}" for k in range(n_units))
        run.bin_width_ns = round(float(info["bin_width"]) * 1e9)

    def _ask(self) -> None:
        """Probe the service after a silence, and find its results address."""
        self._heard = time.monotonic()
        try:
            described = self._client.describe()
        except ServiceError as error:
            if not self._gone:
                self._say(f"the service is gone: {error}")
            self._gone = True
            return
        self._topic.connect(reachable(described.results, self._client.endpoint))
        if self._gone:
            self._gone, self._done_ns = False, 0  # its clock may differ
            self._say("the service is back")
        known = self._service.manifests if self._service is not None else {}
        if described.model not in known:
            self._know(described)

    # ---- what is written -----------------------------------------------------------------------

    def _tell(self, failure: str) -> None:
        """Say when messages cannot be stored, and when they can again."""
        if failure and not self._failure:
            self._say(f"messages are kept in memory until they can be stored: {failure}")
        elif self._failure and not failure:
            self._say("messages are stored again")
        self._failure = failure

    def _refresh(self) -> None:
        """Rewrite the file of a run that goes on; its end is written if this fails."""
        try:
            self._write()
        except ConfigError as error:
            if not self._stale:
                self._say(f"the file is not up to date: {error}")
            self._stale, self._refreshed = True, time.monotonic()

    def _next_path(self) -> Path:
        """Return the file of the next run."""
        for number in itertools.count(2):
            path = self._out.with_stem(f"{self._out.stem}-{number}")
            if path not in self.written and (self._force or not path.exists()):
                return path
        raise AssertionError

    def _write(self) -> None:
        run, began = self._run, time.monotonic()
        if run is None or not run.results:
            return
        write_decoded(self._path, run, self._about)
        self.written[self._path] = len(run.results)
        self._dirty, self._refreshed, self._stale = False, time.monotonic(), False
        self._took = self._refreshed - began

    def _finish(self, why: str = "its end was not heard") -> bool:
        """Finish writing the run. Return whether there was one with answers."""
        run = self._run
        if run is None or not run.results:
            return False
        self._write()
        self._say(
            f"{self._path}: {number_of(len(run.results), 'bin')} of epoch {run.epoch} ({why})"
        )
        self._done_ns, self._run, self._path = self._newest_ns, None, self._next_path()
        if self._log is not None and self._service is not None:
            self._log.begin_again()
            self._service = replace(self._service, path=str(self._path))
            self._log.add(self._service)
        return True
