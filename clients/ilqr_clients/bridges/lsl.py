"""Lab streaming layer: counts or spikes and markers in, decodes out.

A stream of bins has a channel for each unit, with the model's names or the same number; NaN marks a
unit that was not observed. Bins are numbered by a channel ``bin_index``, or by their time stamps
without one. A stream with one channel, while the model has more units, is one of spikes: each
sample is the position of the unit that fired, at its time stamp.

The output is a numeric stream of irregular rate, stamped with the time of the bin. LSL has no
counter, so the first channel is ``bin_index``, and the second the ``revision`` of the answer.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.core import STATUSES, Bridge, SourceBin
from ilqr_clients.bridges.lsl_streams import (
    NamedStream,
    Say,
    StreamSamples,
    load_pylsl,
    lsl_minus_ours_s,
)
from ilqr_clients.bridges.stamps import MOST
from ilqr_clients.session import Session
from ilqr_clients.spike_session import SpikeSession

_LOOK_S = 0.2


class LslBridge(Bridge):
    """Feeds a session from a stream.

    Args:
        endpoint: the service's address.
        stream: name of the stream of bins or spikes.
        session: the session's name.
        markers: name of a stream of markers, which become events of the session; "" for none.
        out: name of the stream of decodes; "" for none.
        say: receives a line for each event.
        options: options of ``ServiceClient.open``.

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
        super().__init__(endpoint, session, say=say, **options)
        self._out, self._markers = out, markers
        self.stream = NamedStream(self._pylsl, stream, say)
        self._outlet: Any = None

    def close(self) -> None:
        """End the session and the streams."""
        super().close()
        self._outlet = None

    def run(self, stop: threading.Event) -> None:
        """Feed until ``stop`` is set, waiting for a stream, session or service that is gone."""
        listener = threading.Thread(target=self._pass_markers, args=(stop,), daemon=True)
        if self._markers:
            listener.start()
        try:
            super().run(stop)
        finally:
            stop.set()
            if self._markers:
                listener.join()

    # ---- in ------------------------------------------------------------------------------------

    def here(self, timeout: float) -> bool:
        here = self.stream.look(timeout)
        if self.stream.found > self.tally["found"]:
            self.began()
        return here

    def spiking(self) -> bool:
        return self.stream.info.channel_count() == 1 and len(self.model.unit_names) > 1

    def pull(self) -> StreamSamples | None:
        samples = self.stream.pull(self.model.bin_width / 4)
        self.tally["unusable"] += self.stream.stampless
        self.stream.stampless = 0
        if samples is None and isinstance(self._session, SpikeSession):
            return StreamSamples(np.zeros((0, 1)), np.zeros(0))  # an empty batch is to be sent
        return samples

    def hand_on(self, came: StreamSamples) -> None:
        if not isinstance(came.values, np.ndarray):
            self.unusable(f"stream {self.stream.name!r} is text; expected counts or spikes")
        elif isinstance(self._session, SpikeSession):
            self._spikes(came)
        else:
            self._bins(came)

    def _times(self, stamps: Any) -> list[int]:
        """Return time stamps by our clock in ns; the session states their uncertainty."""
        assert self._session is not None
        offset, off = lsl_minus_ours_s(self._pylsl, self.clock)
        self._session.clock.also_ns = round((self.stream.uncertainty_s + off) * 1e9)
        at = (stamps + self.stream.correction_s - offset) * 1e9
        return [round(one) for one in at.tolist()]

    def _bins(self, samples: StreamSamples) -> None:
        labels = self.stream.labels()
        counter = labels.index("bin_index") if "bin_index" in labels else None
        units = self.columns(labels, self.stream.info.channel_count(), counter)
        times = self._times(samples.stamps)
        for row, stamp, at_ns in zip(samples.values, samples.stamps.tolist(), times, strict=True):
            number = None
            if counter is not None:
                if not abs(row[counter]) < MOST:  # also for NaN
                    self.unusable(f"samples without a number: bin_index is {row[counter]}")
                    continue
                number = int(row[counter])
            self.send_bin(SourceBin(np.asarray(row[units], np.float64), stamp, at_ns, number))

    def first_of(self, number: int) -> int:
        return number

    def _spikes(self, samples: StreamSamples) -> None:
        times = np.array(self._times(samples.stamps), np.int64)
        values = np.asarray(samples.values)
        units = values[:, 0].astype(np.int64) if values.shape[1] == 1 else np.full(len(values), -1)
        self.send_spikes(times, units, now_ns=self.clock.now_ns())

    # ---- markers -------------------------------------------------------------------------------

    def _pass_markers(self, stop: threading.Event) -> None:
        """Forward markers as events; runs in its own thread."""
        stream = NamedStream(self._pylsl, self._markers, self.say)
        while not stop.is_set():
            samples = stream.pull(0.1) if stream.look(_LOOK_S) else None
            if samples is not None:
                offset, _ = lsl_minus_ours_s(self._pylsl, self.clock)
                for row, stamp in zip(samples.values, samples.stamps.tolist(), strict=True):
                    at_ns = round((stamp + stream.correction_s - offset) * 1e9)
                    texts = [str(value) for value in row]
                    payload = {"stream": self._markers, "values": texts}
                    self.event(texts[0] if texts else "", payload, at_ns)

    # ---- out -----------------------------------------------------------------------------------

    def opened(self, session: Session | SpikeSession) -> None:
        if not self._out or self._outlet is not None:
            return
        pylsl, opened = self._pylsl, session.opened
        kinematics = list(opened.kinematic_names)
        latents = [f"z{k}" for k in range(opened.latents)]
        labels = ["bin_index", "revision", "status"]
        for names in (kinematics, latents):
            labels += names + [f"{name}_std" for name in names]
        source = f"ilqr-vae-{self.name}"
        info = pylsl.StreamInfo(
            self._out, "Decoded", len(labels), pylsl.IRREGULAR_RATE, pylsl.cf_double64, source
        )
        info.set_channel_labels(labels)
        info.desc().append_child_value("model", opened.model)
        info.desc().append_child_value("status", ", ".join(STATUSES))
        self._outlet = pylsl.StreamOutlet(info)

    def _stamp_of(self, ours_ns: int) -> float:
        """One of our times by LSL's clock on this machine."""
        offset, _ = lsl_minus_ours_s(self._pylsl, self.clock)
        return ours_ns / 1e9 + offset

    def answer(self, session: Session | SpikeSession, answer: Answer) -> None:
        if self._outlet is None:
            return
        if isinstance(session, SpikeSession):
            stamp = self._stamp_of(session.end_ns(answer.index))
        elif answer.source_ns:
            stamp = self._stamp_of(answer.source_ns)
        else:  # it did not come: as far from the newest as its number says
            index, at = self.newest
            stamp = at + self.stream.correction_s + (answer.index - index) * self.model.bin_width
        values = [answer.index, answer.revision, STATUSES.index(answer.status)]
        vectors = (answer.kinematics, answer.kinematics_std, answer.latent, answer.latent_std)
        self._outlet.push_sample([*values, *np.concatenate(vectors).tolist()], timestamp=stamp)
