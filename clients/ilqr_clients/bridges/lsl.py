"""Lab streaming layer: counts or spikes and markers in, decodes out.

A stream whose samples are bins has a channel for each unit, of the model's names or as many; NaN is
a unit that was not observed. A channel ``bin_index`` numbers the bins; without it their stamps do.
A stream of one channel, while the model has more units, is one of spikes: each sample is the
position of the unit that fired, and its stamp is when.

What goes out is a stream of numbers with irregular rate, stamped with the time of the bin: LSL has
no counter, so its first channel is ``bin_index``, and the second the answer's ``revision``.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.lsl_streams import NamedStream, Samples, Say, load_pylsl, lsl_minus_ours_s
from ilqr_clients.bridges.stamps import StampIndex
from ilqr_clients.connection import Closing, Model, model_of
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.session import Session
from ilqr_clients.spike_session import SpikeSession
from ilqr_vae.errors import RequestRefusedError, ServiceError, ShapeError

STATUSES = ("ok", "degraded", "late", "missing", "extrapolated")
"""What the channel ``status`` counts from 0."""

_AGAIN_S, _LOOK_S = 1.0, 0.2


class LslBridge(Closing):
    """Feeds one session from one stream.

    Args:
        endpoint: the service's address.
        stream: name of the stream of bins or spikes.
        session: the session's name.
        markers: name of a stream of markers, which become the session's events; "" is none.
        out: name of the stream of decodes; "" is none.
        say: is told what happens, a line each.
        options: of ``ServiceClient.open``.

    Attributes:
        tally: how many ``samples`` came; ``bins`` or ``batches`` were sent, ``refused``,
            ``answers`` came, ``markers`` were passed on; how many bins did not come (``gap``);
            samples that came ``late``, ``repeated``, or could not be used (``unusable``); clock
            ``steps``; times that a source was ``found``; ``sessions_lost``.

    Raises:
        ConfigError: pylsl is not installed.
        ServiceError: the service is not reachable.
    """

    def __init__(
        self,
        endpoint: str,
        stream: str,
        session: str,
        *,
        markers: str = "",
        out: str = "",
        say: Say = lambda _: None,
        **options: Any,
    ) -> None:
        self._pylsl = load_pylsl()
        self.tally: Counter[str] = Counter()
        self._name, self._out, self._markers, self._say = session, out, markers, say
        self._options = {"clocked": True, "on_error": self._wrong} | options
        self._client = ServiceClient(endpoint)
        self._clock = self._client.timer
        try:
            self._model: Model = model_of(self._client.describe())
        except ServiceError:
            self._client.close()
            raise
        self._stream = NamedStream(self._pylsl, stream, say)
        self._session: Session | SpikeSession | None = None
        self._error: ServiceError | None = None
        self._outlet: Any = None
        self._place = StampIndex(self._model.bin_width)
        self._counted: int | None = None
        self._anchor = (0, 0.0)
        self._source_ns = -(2**62)
        self._gone = False

    def close(self) -> None:
        """End the session and the streams."""
        if self._session is not None:
            self._session.close()
        self._client.close()
        self._outlet = None

    def run(self, stop: threading.Event) -> None:
        """Feed until ``stop`` is set. A stream, session or service that is gone is waited for."""
        listener = threading.Thread(target=self._pass_markers, args=(stop,), daemon=True)
        if self._markers:
            listener.start()
        try:
            while not stop.is_set():
                try:
                    self._turn()
                except ServiceError as error:
                    self._say(f"the session is gone: {error}")
                    self.tally["sessions_lost"] += 1
                    if self._session is not None:
                        self._session.abandon()
                        self._session = None
                    stop.wait(_AGAIN_S)
        finally:
            stop.set()
            if self._markers:
                listener.join()

    def _wrong(self, error: ServiceError) -> None:
        """What the session reports: a message that was refused costs itself."""
        if isinstance(error, RequestRefusedError):
            self.tally["refused"] += 1
            self._say(str(error))
        else:
            self._error = error

    # ---- in ------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Pass on what has come, both ways. Raises ServiceError: the session is gone."""
        here = self._stream.look(_LOOK_S)
        self.tally["found"] = self._stream.found
        samples = self._stream.pull(self._model.bin_width / 4)
        if self._session is None and here:
            self._open()
        session = self._session
        if session is None:
            return
        if isinstance(session, SpikeSession):
            self._spikes(session, samples, here)
        elif samples is not None:
            self._bins(session, samples)
        for answer in session.receive():
            self._answer(session, answer)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _open(self) -> None:
        """Raises ServiceError."""
        model, now = self._model, self._clock.now_ns()
        options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
        options |= self._options
        if self._stream.info.channel_count() == 1 and len(model.unit_names) > 1:
            self._session = self._client.open_spikes(self._name, origin_ns=now, **options)
        else:
            self._session = self._client.open(self._name, **options)
        self._place, self._counted = StampIndex(model.bin_width), None
        self._source_ns, self._error, self._gone = -(2**62), None, False
        if self._out and self._outlet is None:
            self._offer(self._session)
        self._say(f"session {self._name!r}, epoch {self._session.opened.epoch}: {model.model_id}")

    def _times(self, session: Session | SpikeSession, stamps: Any) -> list[int]:
        """Stamps by our clock, ns; the session states how far off they may be."""
        offset, off = lsl_minus_ours_s(self._pylsl, self._clock)
        session.clock.also_ns = round((self._stream.uncertainty_s + off) * 1e9)
        at = (stamps + self._stream.correction_s - offset) * 1e9
        return [round(one) for one in at.tolist()]

    def _bins(self, session: Session, samples: Samples) -> None:
        units, counter = self._channels()
        arrived = self._clock.now_ns() / 1e9
        times = self._times(session, samples.stamps)
        for row, stamp, at_ns in zip(samples.values, samples.stamps.tolist(), times, strict=True):
            self.tally["samples"] += 1
            index = self._index(row, counter, stamp, arrived)
            if index is None:
                continue
            values = row[units]
            observed = np.isfinite(values)
            mask = None if observed.all() else observed
            newest = index > self._anchor[0] or not self.tally["bins"]
            source_ns = max(self._source_ns, at_ns) if newest else at_ns
            try:
                session.send(index, np.where(observed, values, 0), mask=mask, source_ns=source_ns)
            except ShapeError as error:
                if not self.tally["unusable"]:
                    self._say(f"samples that cannot be used: {error}")
                self.tally["unusable"] += 1
                continue
            self.tally["bins"] += 1
            if newest:
                self._source_ns, self._anchor = source_ns, (index, stamp)

    def _channels(self) -> tuple[list[int], int | None]:
        """Positions of the units' channels in the model's order, and of the counter."""
        labels = self._stream.labels()
        counter = labels.index("bin_index") if "bin_index" in labels else None
        place = {label: k for k, label in enumerate(labels)}
        if all(name in place for name in self._model.unit_names):
            return [place[name] for name in self._model.unit_names], counter
        return [k for k in range(self._stream.info.channel_count()) if k != counter], counter

    def _index(self, row: Any, counter: int | None, stamp: float, arrived: float) -> int | None:
        """The bin of a sample; None where it has come."""
        placed = self._place.place(stamp, arrived)
        if placed.kind == "repeated":
            self.tally["repeated"] += 1
            return None
        if placed.kind == "late":
            self.tally["late"] += 1
        if placed.kind == "step":
            self.tally["steps"] += 1
            self._say(f"the clock of the stream was set; it goes on with bin {placed.index}")
        elif placed.skipped and counter is None:
            self._lost(placed.index, placed.skipped)
        if counter is None:
            return placed.index
        index = int(row[counter])
        if self._counted is not None and index > self._counted + 1:
            self._lost(index, index - self._counted - 1)
        self._counted = index if self._counted is None else max(self._counted, index)
        return index

    def _lost(self, index: int, skipped: int) -> None:
        self.tally["gap"] += skipped
        self._say(f"bins {index - skipped} to {index - 1} did not come")

    def _spikes(self, session: SpikeSession, samples: Samples | None, here: bool) -> None:
        """Send a batch, also an empty one while the source is there; without it the bins are
        missing, and so are those until the first batch after it is back."""
        if not here:
            self._gone = True
            return
        if self._gone:
            session.skip_batch()
            self._gone = False
        times, units = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if samples is not None:
            times = np.array(self._times(session, samples.stamps), np.int64)
            values = np.asarray(samples.values)
            units = values[:, 0].astype(np.int64)
            known = (units >= 0) & (units < len(self._model.unit_names)) & (values.shape[1] == 1)
            self.tally["samples"] += len(units)
            self.tally["unusable"] += int((~known).sum())
            times, units = times[known], units[known]
        now = max(self._source_ns, self._clock.now_ns(), int(times.max(initial=self._source_ns)))
        self._source_ns = now
        session.send_spikes(times, units, source_ns=now)
        self.tally["batches"] += 1

    # ---- markers -------------------------------------------------------------------------------

    def _pass_markers(self, stop: threading.Event) -> None:
        """Pass markers on as events, in a thread of its own."""
        stream = NamedStream(self._pylsl, self._markers, self._say)
        with ServiceClient(self._client.endpoint) as client:
            while not stop.is_set():
                samples = stream.pull(0.1) if stream.look(_LOOK_S) else None
                if samples is None:
                    continue
                offset, _ = lsl_minus_ours_s(self._pylsl, self._clock)
                for row, stamp in zip(samples.values, samples.stamps.tolist(), strict=True):
                    at_ns = round((stamp + stream.correction_s - offset) * 1e9)
                    texts = [str(value) for value in row]
                    name = (texts[0] if texts else "").strip()[:64] or "marker"
                    payload = {"stream": self._markers, "values": texts}
                    while not stop.is_set():
                        try:
                            client.event(self._name, name, payload, time_ns=at_ns)
                        except ServiceError as error:
                            self._say(f"marker {name!r} waits: {error}")
                            stop.wait(_AGAIN_S)
                            continue
                        self.tally["markers"] += 1
                        break

    # ---- out -----------------------------------------------------------------------------------

    def _offer(self, session: Session | SpikeSession) -> None:
        pylsl, opened = self._pylsl, session.opened
        kinematics = list(opened.kinematic_names)
        latents = [f"z{k}" for k in range(opened.latents)]
        labels = ["bin_index", "revision", "status"]
        for names in (kinematics, latents):
            labels += names + [f"{name}_std" for name in names]
        source = f"ilqr-vae-{self._name}"
        info = pylsl.StreamInfo(
            self._out, "Decoded", len(labels), pylsl.IRREGULAR_RATE, pylsl.cf_double64, source
        )
        info.set_channel_labels(labels)
        info.desc().append_child_value("model", opened.model)
        info.desc().append_child_value("status", ", ".join(STATUSES))
        self._outlet = pylsl.StreamOutlet(info)

    def _stamp_of(self, ours_ns: int) -> float:
        """One of our times by LSL's clock on this machine."""
        offset, _ = lsl_minus_ours_s(self._pylsl, self._clock)
        return ours_ns / 1e9 + offset

    def _answer(self, session: Session | SpikeSession, answer: Answer) -> None:
        self.tally["answers"] += 1
        if self._outlet is None:
            return
        if isinstance(session, SpikeSession):
            stamp = self._stamp_of(session.end_ns(answer.index))
        elif answer.source_ns:
            stamp = self._stamp_of(answer.source_ns)
        else:  # it did not come: as far from the newest as its number says
            index, at = self._anchor
            stamp = at + self._stream.correction_s + (answer.index - index) * self._model.bin_width
        values = [answer.index, answer.revision, STATUSES.index(answer.status)]
        vectors = (answer.kinematics, answer.kinematics_std, answer.latent, answer.latent_std)
        self._outlet.push_sample([*values, *np.concatenate(vectors).tolist()], timestamp=stamp)
