"""Open Ephys: spikes and TTL events of its ZMQ Interface plugin.

Each message has an envelope, a JSON header and data. A spike names its electrode and a sorted unit.
A unit of the model is named ``electrode:sorted_id``, or as the electrode, whose sorted units are
then pooled. Times are sample numbers, so bins have their edges on the clock of the acquisition.
Continuous data of at least one channel shows the current time. The bridge sends the heartbeat that
the plugin expects to the port after that of the data.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from typing import Any, cast

import numpy as np
import zmq

from ilqr_clients.bridges.core import Say
from ilqr_clients.bridges.stamps import MOST, SourceClock
from ilqr_clients.bridges.zmq_source import ZmqBridge
from ilqr_vae.errors import spanned

_HEARTBEAT_S, _HOLES, _SEEN = 2.0, 64, 4096
_RATE, _HIGHEST_RATE = 30000.0, 1e7


class OpenEphysBridge(ZmqBridge):
    """Feeds a session with the spikes of a plugin.

    Args:
        endpoint: the service's address.
        stream: address of the plugin's data port, e.g. ``tcp://127.0.0.1:5556``.
        session: the session's name.
        rate: samples per second, until continuous data states it.
        say: receives a line for each event.
        options: options of ``ServiceClient.open``.

    Raises:
        ConfigError: ``stream`` is not an address with a port.
        ServiceError: the service is not reachable.
    """

    def __init__(
        self,
        endpoint: str,
        stream: str,
        session: str,
        *,
        rate: float = _RATE,
        say: Say = lambda _: None,
        **options: Any,
    ) -> None:
        super().__init__(endpoint, stream, session, say=say, **options)
        self._rate = rate
        host, _, port = stream.rpartition(":")
        self._beat = self.context.socket(zmq.DEALER)
        self._beat.connect(f"{host}:{int(port) + 1}")
        self._uuid, self._beaten = str(uuid.uuid4()), 0.0
        self._units = {name: k for k, name in enumerate(self.model.unit_names)}
        self._source = SourceClock()
        self._last: int | None = None
        self._known: dict[int, bytes] = {}
        self._holes: dict[int, tuple[int, int]] = {}
        self._times: list[int] = []
        self._which: list[int] = []
        self._now_ns = 0
        self._until_ns: int | None = None
        self._sent_ns, self._step_ns = 0, round(self.model.bin_width * 1e9)
        self._odd: set[str] = set()

    # ---- the plugin ----------------------------------------------------------------------------

    def here(self, timeout: float) -> bool:
        if time.monotonic() - self._beaten > _HEARTBEAT_S:
            self._beaten = time.monotonic()
            beat = {"application": "ilqr-vae", "uuid": self._uuid, "type": "heartbeat"}
            with contextlib.suppress(zmq.Again):
                self._beat.send_multipart([b"", json.dumps(beat).encode()], zmq.NOBLOCK)
        while self._beat.poll(0):
            self._beat.recv_multipart()
        return super().here(timeout)

    def spiking(self) -> bool:
        return True

    def pull(self) -> list[list[bytes]]:
        came = super().pull()
        if self._session is None:  # the first message sets its origin
            for frames in came:
                if (stamp_ns := self._stamp(self._header(frames))) is not None:
                    self._source = SourceClock()
                    self._source.take(stamp_ns, self.clock.now_ns())
                    self._now_ns = self._source.ours_ns(stamp_ns)
                    return came
        return came

    def origin(self, now_ns: int) -> int:
        return self._now_ns

    def opened(self, session: Any) -> None:
        self._last, self._until_ns = None, None
        self._known, self._holes = {}, {}

    # ---- its messages ----------------------------------------------------------------------------

    def _header(self, frames: list[bytes]) -> dict[str, Any]:
        """Return the header of a message; empty if it has none."""
        try:
            header = json.loads(frames[1].rstrip(b"\0"))
        except (IndexError, ValueError, RecursionError):
            return {}
        return cast(dict[str, Any], header) if isinstance(header, dict) else {}

    def _body(self, header: dict[str, Any]) -> dict[str, Any]:
        body = header.get("content", header.get("spike"))
        return cast(dict[str, Any], body) if isinstance(body, dict) else {}

    def _stamp(self, header: dict[str, Any]) -> int | None:
        """Return its time in ns of the acquisition's clock; None if it states none."""
        body = self._body(header)
        rate = body.get("sample_rate") if header.get("type") == "data" else None
        if isinstance(rate, int | float) and 1 <= rate <= _HIGHEST_RATE:
            self._rate = float(rate)
        sample = body.get("timestamp", body.get("sample_num"))
        if not isinstance(sample, int) or abs(sample) * 1_000_000_000 >= MOST * int(self._rate):
            return None
        return round(sample * 1e9 / self._rate)

    def hand_on(self, came: list[list[bytes]]) -> None:
        for frames in came:
            self._message(frames)
        self._flush()

    def _message(self, frames: list[bytes]) -> None:
        header = self._header(frames)
        stamp_ns = self._stamp(header)
        if stamp_ns is None:
            self.tally["unusable"] += 1
            return
        number = header.get("message_num", header.get("message_no"))
        hole = self._follow(number, frames[1]) if isinstance(number, int) else None
        if hole == "repeated":
            self.tally["repeated"] += 1
            return
        if not isinstance(hole, tuple) and self._source.take(stamp_ns, self.clock.now_ns()):
            self.tally["steps"] += 1
            self.say("the clock of the stream was set")
        at_ns, body = self._source.ours_ns(stamp_ns), self._body(header)
        if not isinstance(hole, tuple):
            self.resume_at(at_ns, self._until_ns)
        spikes: list[int] = []
        if header.get("type") == "spike":
            spikes = self._unit(body)
        elif header.get("type") == "event":
            self._event(body, frames[2] if len(frames) > 2 else b"", at_ns)
        if isinstance(hole, tuple):
            batch, after_ns = hole
            times = np.full(len(spikes), at_ns, np.int64)
            which = np.array(spikes, np.int64)
            now = max(after_ns, at_ns)
            self.send_spikes(times, which, now_ns=now, batch=batch, after_ns=after_ns)
            return
        if header.get("type") == "data":
            samples = body.get("n_real_samples", body.get("num_samples", 0))
            samples = samples if isinstance(samples, int) and 0 <= samples <= self._rate else 0
            if self._until_ns is not None and at_ns - self._sent_ns >= self._step_ns:
                self._flush()  # so that a batch closes few bins
            self._until_ns = max(self._until_ns or at_ns, at_ns)
            self._now_ns = max(self._now_ns, at_ns + round(samples * 1e9 / self._rate))
        self._times += [at_ns] * len(spikes)
        self._which += spikes

    def _follow(self, number: int, header: bytes) -> tuple[int, int] | str | None:
        """Track message numbers: return ``repeated``, the skipped batch of a late one, or None."""
        last, again = self._last, self._known.get(number) == header
        if again and not self._fresh:
            return "repeated"
        self._known[number] = header
        if len(self._known) > _SEEN:
            del self._known[next(iter(self._known))]
        if last is not None and number <= last:
            if number in self._holes:
                self.tally["late"] += 1
                return self._holes.pop(number)
            # its numbers restart
            self._known, self._holes, self._fresh = {number: header}, {}, False
            self._source.begin_again()
        elif last is not None and number > last + 1:
            self._lose(last + 1, number)
        self._last = number
        return None

    def _lose(self, first: int, end: int) -> None:
        """Mark the contents of lost messages as missing, unless they arrive later."""
        self.tally["lost"] += end - first
        self.say(f"{spanned('message', first, end - 1)} did not come")
        self._flush()
        after_ns = self._source_ns
        for number in range(max(first, end - _HOLES), end):
            self._holes[number] = self.skip(), after_ns
        while len(self._holes) > _HOLES:
            del self._holes[next(iter(self._holes))]

    def _unit(self, body: dict[str, Any]) -> list[int]:
        """Return the unit of a spike; empty if the model has none of this name."""
        electrode = str(body.get("electrode", body.get("electrode_id", "")))
        for name in (f"{electrode}:{body.get('sorted_id', 0)}", electrode):
            if name in self._units:
                return [self._units[name]]
        self.tally["unusable"] += 1
        if electrode not in self._odd:
            self._odd.add(electrode)
            self.say(f"spikes of electrode {electrode!r}, which is no unit of the model")
        return []

    def _event(self, body: dict[str, Any], data: bytes, at_ns: int) -> None:
        about = {key: body[key] for key in ("stream", "source_node") if key in body}
        if len(data) >= 10:
            line, state, word = data[0], data[1], int.from_bytes(data[2:10], "little")
            self.event("ttl", about | {"line": line, "state": state, "word": word}, at_ns)
        elif "event_channel" in body:
            line, state = body["event_channel"], body.get("event_id", 0)
            self.event("ttl", about | {"line": line, "state": state}, at_ns)
        else:
            text = data.rstrip(b"\0").decode(errors="replace")
            self.event(text or "message", about, at_ns)

    def _flush(self) -> None:
        """Send the received spikes."""
        self._sent_ns = self._until_ns or 0
        now = self._now_ns if self._until_ns is not None else self.clock.now_ns()
        times, which = np.array(self._times, np.int64), np.array(self._which, np.int64)
        self._times, self._which = [], []
        self.send_spikes(times, which, now_ns=now, until_ns=self._until_ns)
