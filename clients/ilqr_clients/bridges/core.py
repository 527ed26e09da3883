"""Shared by all bridges: a session that is fed from a source, and reopened when it is lost.

A bridge reads from its source and sends bins or spikes. Repeated, late, missing and unusable
samples, and clock changes, are reported when they are noticed, and counted.
"""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.stamps import CountedIndex, StampIndex
from ilqr_clients.connection import Closing, Model, model_of
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.session import Session
from ilqr_clients.spike_session import SpikeSession
from ilqr_clients.stream import seen
from ilqr_vae.errors import (
    IlqrVaeError,
    RequestRefusedError,
    ServiceError,
    SessionEnd,
    SessionEndedError,
    ShapeError,
    number_of,
    spanned,
)

STATUSES = ("ok", "degraded", "late", "missing", "extrapolated")
"""Statuses in a stream of decodes, numbered from 0."""

AGAIN_S = 1.0
_CREDIT_S, _LOOK_S = 0.05, 0.2
_NONE = np.zeros(0, np.int64)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SourceBin:
    """A bin from the source.

    Attributes:
        values: (C,) counts; NaN if not observed.
        stamp_s: time by the source's clock.
        at_ns: time by this client's clock.
        number: number that the source gives it; None if it does not.
    """

    values: NDArray[np.float64]
    stamp_s: float
    at_ns: int
    number: int | None = None


class Bridge(Closing):
    """Feeds a session from a source.

    Args:
        endpoint: the service's address.
        session: the session's name.
        say: receives a line for each event.
        options: options of ``ServiceClient.open``.

    Attributes:
        tally: counts of ``samples`` received; ``bins`` or ``batches`` sent; ``refused`` messages;
            ``answers``; ``markers`` forwarded; missing bins (``gap``) and messages (``lost``);
            samples that were ``late``, ``repeated`` or ``unusable``; clock ``steps``; times that a
            source was ``found``; ``sessions_lost``.

    Raises:
        ServiceError: the service is not reachable.
    """

    def __init__(
        self, endpoint: str, session: str, *, say: Say = lambda _: None, **options: Any
    ) -> None:
        self.tally: Counter[str] = Counter()
        self.say = say
        self.name = session
        self._session: Session | SpikeSession | None = None
        self._options = {"clocked": True, "on_error": self._wrong} | options
        self.client = ServiceClient(endpoint)
        self.clock = self.client.timer
        try:
            self.model: Model = model_of(self.client.describe())
            self.model.require_counts("a bridge")
        except ServiceError:
            self.client.close()
            raise
        self._fresh, self._channels = False, 0
        self._events: queue.Queue[tuple[str, dict[str, Any], int]] = queue.Queue()
        self._stop = threading.Event()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Reset the state for a session to which nothing was sent yet."""
        self._error: ServiceError | None = None
        self._place = StampIndex(self.model.bin_width)
        self._count = CountedIndex(self.first_of)
        self.newest = (-1, 0.0)
        self._times_of: dict[int, int] = {}
        self._source_ns = -(2**62)
        self._gone = self._lacking = False

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()
        self.client.close()

    # ---- what a bridge has to say ----------------------------------------------------------------

    @abstractmethod
    def here(self, timeout: float) -> bool:
        """Look for the source if it is absent. Return whether it is present."""

    @abstractmethod
    def spiking(self) -> bool:
        """Return whether the source sends spikes instead of bins."""

    @abstractmethod
    def pull(self) -> Any:
        """Return new data, waiting about a quarter of a bin for it; None if there is none."""

    @abstractmethod
    def hand_on(self, came: Any) -> None:
        """Send the pulled data to the open session. Raises ServiceError."""

    def answer(self, session: Session | SpikeSession, answer: Answer) -> None:
        """Handle an answer."""

    # ---- the session -----------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Feed until ``stop`` is set or another client opens the session; wait for what is gone."""
        self._stop = stop
        teller = threading.Thread(target=self._tell, daemon=True)
        teller.start()
        try:
            while not stop.is_set():
                try:
                    self._turn()
                except ServiceError as error:
                    self.say(f"the session is gone: {error}")
                    self.tally["sessions_lost"] += 1
                    if self._session is not None:
                        self._session.abandon()
                        self._session = None
                    if isinstance(error, SessionEndedError) and error.end is SessionEnd.TAKEN:
                        return  # both would open it again and again
                    stop.wait(AGAIN_S)
        finally:
            stop.set()
            teller.join()

    def _wrong(self, error: ServiceError) -> None:
        """Handle an error of the session: a refused message is only lost itself."""
        if isinstance(error, RequestRefusedError):
            self.tally["refused"] += 1
            self.say(str(error))
        else:
            self._error = error

    def _turn(self) -> None:
        here = self.here(_LOOK_S)
        came = self.pull()
        if self._session is None and (here or self.here(0.0)):  # keep the first data
            self.open()
        if self._session is None:
            return
        if isinstance(self._session, SpikeSession) and self.away(not here):
            came = None
        if came is not None:
            self.hand_on(came)
        self.answers(0.0)

    def open(self) -> None:
        """Open the session. Raises ServiceError."""
        model, now = self.model, self.clock.now_ns()
        options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
        options |= self._options
        if self.spiking():
            options["origin_ns"] = self.origin(now)
        self._session = self.client.open(self.name, **options)
        self._begin_anew()
        self.opened(self._session)
        self.say(f"session {self.name!r}, epoch {self._session.opened.epoch}: {model.model_id}")

    def origin(self, now_ns: int) -> int:
        """Return when bin 0 of a spike session begins, by this client's clock."""
        return now_ns

    def opened(self, session: Session | SpikeSession) -> None:
        """Called when the session is open."""

    def answers(self, timeout: float) -> list[Answer]:
        """Handle available answers. Raises ServiceError if the session is gone."""
        session = self._session
        assert session is not None
        came = session.receive(timeout)
        for answer in came:
            self.tally["answers"] += 1
            self.answer(session, answer)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return came

    def event(self, name: str, payload: dict[str, Any], at_ns: int) -> None:
        """Add an event, by this client's clock, retrying until it is taken; thread-safe."""
        self._events.put((name.strip()[:64] or "marker", payload, at_ns))

    def _tell(self) -> None:
        with ServiceClient(self.client.endpoint) as client:
            while not (self._stop.is_set() and self._events.empty()):
                try:
                    event = self._events.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                while not self._told(client, *event) and not self._stop.wait(AGAIN_S):
                    pass

    def _told(self, client: ServiceClient, name: str, payload: dict[str, Any], at_ns: int) -> bool:
        """Return whether the service has taken an event, or refused it for good."""
        try:
            client.event(self.name, name, payload, time_ns=at_ns)
        except RequestRefusedError as error:
            if error.field == "session":  # it is not open
                return False
            self._wrong(error)
            return True
        except ServiceError as error:
            self.say(f"marker {name!r} waits: {error}")
            return False
        except IlqrVaeError as error:  # it holds what no message can
            self.unusable(f"marker {name!r} cannot be used: {error}")
        else:
            self.tally["markers"] += 1
        return True

    # ---- bins ------------------------------------------------------------------------------------

    def columns(
        self, labels: Sequence[str], channels: int, counter: int | None = None
    ) -> list[int]:
        """Return the positions of the units in a sample: by name if all match, else of channels."""
        place = {label: k for k, label in enumerate(labels)}
        if all(name in place for name in self.model.unit_names):
            return [place[name] for name in self.model.unit_names]
        return [k for k in range(channels) if k != counter]

    def send_bin(self, sample: SourceBin) -> None:
        """Number a bin and send it. Raises ServiceError if the session is gone."""
        self.tally["samples"] += 1
        if (index := self._index(sample)) is None:
            return
        session = self._session
        assert isinstance(session, Session)
        observed = np.isfinite(sample.values)
        newest = index > self.newest[0]
        source_ns = self._ordered(index, sample.at_ns)
        self._wait_for_credit(session)
        try:
            counts, mask = np.where(observed, sample.values, 0), seen(observed)
            session.send(index, counts, mask=mask, source_ns=source_ns)
        except ShapeError as error:
            self.unusable(f"samples that cannot be used: {error}")
            return
        self.tally["bins"] += 1
        if newest:
            self.newest = index, sample.stamp_s

    def unusable(self, what: str, count: int = 1) -> None:
        """Count data that cannot be used, and report the first."""
        if not self.tally["unusable"]:
            self.say(what)
        self.tally["unusable"] += count

    def _ordered(self, index: int, at_ns: int) -> int:
        """Return the time of a bin, clipped between those of its neighbours."""
        before = max((at for k, at in self._times_of.items() if k < index), default=at_ns)
        after = min((at for k, at in self._times_of.items() if k > index), default=2**62)
        self._times_of[index] = min(max(at_ns, before), after)
        if len(self._times_of) > 128:
            del self._times_of[min(self._times_of)]
        return self._times_of[index]

    def _wait_for_credit(self, session: Session | SpikeSession) -> None:
        """Wait for a credit if the source is faster than the service."""
        for _ in range(round(session.patience / _CREDIT_S)):
            if session.credits > 0 or self._stop.is_set():
                return
            self.answers(_CREDIT_S)

    def count_channels(self, channels: int) -> None:
        """Record the number of channels of the source."""
        if self._channels not in (0, channels):
            now = number_of(channels, "channel")
            self.say(f"the source has {now}, not {self._channels} as before")
        self._channels = channels

    def began(self) -> None:
        """Handle a new source, whose numbers may restart."""
        self.tally["found"] += 1
        self._fresh = self.tally["found"] > 1
        if self._fresh:
            self._place.begin_again()
            self._count.begin_again()

    def _index(self, sample: SourceBin) -> int | None:
        """Return the bin index of a sample; None if it was sent already."""
        placed = self._place.place(sample.stamp_s, self.clock.now_ns() / 1e9)
        if placed.kind == "step":
            self.tally["steps"] += 1
            self.say(f"the clock of the stream was set; it goes on with bin {placed.index}")
        if sample.number is not None:
            placed = self._count.place(sample.number, placed)
        if placed.kind == "repeated":
            self.tally["repeated"] += 1
            return None
        if placed.kind == "late":
            self.tally["late"] += 1
        elif placed.kind == "gap":
            self.tally["gap"] += placed.skipped
            first = placed.index - placed.skipped
            self.say(f"{spanned('bin', first, placed.index - 1)} did not come")
        return placed.index if placed.index >= 0 else None

    def first_of(self, number: int) -> int:
        """Return the bin index of the first sample, which has this number."""
        return 0

    # ---- spikes ----------------------------------------------------------------------------------

    def away(self, gone: bool) -> bool:
        """Record whether the source of spikes is gone; its bins are missing until it is back."""
        if self._gone and not gone:
            assert isinstance(self._session, SpikeSession)
            self.skip()
        self._gone = gone
        return gone

    def resume_at(self, at_ns: int, until_ns: int | None) -> None:
        """Note the time of the first data after a loss, before which data are lost."""
        if self._lacking:
            self.send_spikes(_NONE, _NONE, now_ns=at_ns, until_ns=until_ns)

    def skip(self) -> int:
        """Skip lost messages; return the number of the batch that may still supply them."""
        assert isinstance(self._session, SpikeSession)
        self._lacking = True
        return self._session.skip_batch()

    def send_spikes(
        self,
        times_ns: NDArray[np.int64],
        units: NDArray[np.int64],
        *,
        now_ns: int,
        until_ns: int | None = None,
        batch: int | None = None,
        after_ns: int = 0,
    ) -> None:
        """Send a batch of spikes, which may be empty.

        Args:
            times_ns, units: (S,) by this client's clock, and positions of units in the model.
            now_ns: current time of the source.
            until_ns: no earlier spike will follow; default: ``now_ns`` minus the grace.
            batch, after_ns: number of a skipped batch, and the time of the source then.

        Raises:
            ServiceError: the session is gone.
        """
        session = self._session
        assert isinstance(session, SpikeSession)
        known = (units >= 0) & (units < len(self.model.unit_names))
        self.tally["samples"] += len(units)
        if unusable := int((~known).sum()):
            self.unusable(f"spikes of no unit of the model: {units[~known][0]} first", unusable)
        times, units = times_ns[known], units[known]
        self._wait_for_credit(session)
        if batch is not None:
            at = int(times.max(initial=after_ns))
            session.send_spikes(times, units, source_ns=at, until_ns=after_ns, batch=batch)
            return
        now = max(self._source_ns, now_ns, int(times.max(initial=self._source_ns)))
        self._source_ns, self._lacking = now, False
        session.send_spikes(times, units, source_ns=now, until_ns=until_ns)
        self.tally["batches"] += 1
