"""Synapse: spike trains and broadband data of a tap, which are ZeroMQ messages in protobuf.

Frames of spike trains (``synapse.SpiketrainFrame``) are bins, or fractions of the model's bins,
which are summed. In frames of broadband data (``synapse.BroadbandFrame``) a spike is detected where
a channel falls below ``threshold`` times its noise. Channels are the model's units, by number if
the units are named so, else in order. The fields are those of Synapse 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.bridges.core import Say, SourceBin
from ilqr_clients.bridges.stamps import MOST, Gather, SourceClock
from ilqr_clients.bridges.zmq_source import ZmqBridge
from ilqr_vae.errors import ConfigError, spanned

_DEAD_S, _NOISE_S, _MOST_LOST = 1e-3, 1.0, 64

SPIKETRAIN = {
    "timestamp_ns": (1, "UINT64", False),
    "sequence_number": (2, "UINT64", False),
    "bin_size_ms": (3, "UINT32", False),
    "spike_counts": (4, "UINT32", True),
    "channel_ids": (5, "UINT32", True),
}
BROADBAND = {
    "timestamp_ns": (1, "UINT64", False),
    "sequence_number": (2, "UINT64", False),
    "frame_data": (3, "SINT32", True),
    "sample_rate_hz": (4, "UINT32", False),
}


def frame_types() -> tuple[Any, Any]:
    """Return Protobuf classes of frames of spike trains and of broadband data.

    They have the fields that are read here. Raises ConfigError if protobuf is not installed.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ModuleNotFoundError as error:
        expected = "the package protobuf; try: pip install '.[synapse]'"
        raise ConfigError("bridge synapse", expected=expected, got="none") from error
    kinds: Any = descriptor_pb2.FieldDescriptorProto
    file: Any = descriptor_pb2.FileDescriptorProto(
        name="ilqr_vae/synapse.proto", package="ilqr_vae.synapse", syntax="proto3"
    )
    for name, members in (("SpiketrainFrame", SPIKETRAIN), ("BroadbandFrame", BROADBAND)):
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in members.items():
            message.field.add(
                name=field,
                number=number,
                type=getattr(kinds, f"TYPE_{kind}"),
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ilqr_vae.synapse.{name}"))
        for name in ("SpiketrainFrame", "BroadbandFrame")
    ]
    return made[0], made[1]


class Detector:
    """Detects spikes in broadband data: where a channel minus its mean falls below a threshold.

    The mean and the noise (median absolute deviation) are estimated from the first second, then
    updated.

    Args:
        threshold: in standard deviations of the noise, positive.
        rate: samples per second.
    """

    def __init__(self, threshold: float, rate: float) -> None:
        self.threshold, self.rate = threshold, rate
        self._first: list[NDArray[np.float64]] = []
        self._mean: Any = None
        self._noise: Any = None
        self._below: Any = None
        self._quiet_from: Any = None
        self._sample = 0

    def find(self, values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the spikes in samples (S, C): sample and channel of each."""
        if self._noise is None:
            self._first.append(values)
            if sum(map(len, self._first)) < _NOISE_S * self.rate:
                self._sample += len(values)
                return np.zeros(0, np.int64), np.zeros(0, np.int64)
            seen = np.concatenate(self._first)
            self._mean = np.median(seen, axis=0)
            self._noise = np.median(np.abs(seen - self._mean), axis=0) / 0.6745
            self._below = np.zeros(seen.shape[1], bool)
            self._quiet_from = np.zeros(seen.shape[1], np.int64)
            self._first = []
        follow = min(1.0, len(values) / (_NOISE_S * self.rate)) / 8
        centred = values - self._mean
        below = centred < -self.threshold * np.maximum(self._noise, 1e-9)
        before = np.vstack([self._below, below[:-1]])
        samples, channels = np.nonzero(below & ~before)
        kept: list[int] = []
        for k, (sample, channel) in enumerate(
            zip(samples.tolist(), channels.tolist(), strict=True)
        ):
            at = self._sample + sample
            if at >= self._quiet_from[channel]:
                self._quiet_from[channel] = at + round(_DEAD_S * self.rate)
                kept.append(k)
        if len(values):
            self._below = below[-1]
        self._mean = self._mean + follow * np.median(centred, axis=0)
        noise = np.median(np.abs(centred), axis=0) / 0.6745
        self._noise = self._noise + follow * (noise - self._noise)
        self._sample += len(values)
        return samples[kept], channels[kept]


class SynapseBridge(ZmqBridge):
    """Feeds a session from a tap.

    Args:
        endpoint: the service's address.
        stream: address of the tap, as the device lists it, e.g. ``tcp://10.0.0.7:5581``.
        session: the session's name.
        threshold: threshold of spikes in broadband data, in standard deviations of the noise.
        say: receives a line for each event.
        options: options of ``ServiceClient.open``.

    Raises:
        ConfigError: protobuf is not installed, or ``stream`` is not an address with a port.
        ServiceError: the service is not reachable.
    """

    def __init__(
        self,
        endpoint: str,
        stream: str,
        session: str,
        *,
        threshold: float = 4.5,
        say: Say = lambda _: None,
        **options: Any,
    ) -> None:
        self._trains, self._broadband = frame_types()
        super().__init__(endpoint, stream, session, say=say, **options)
        self._threshold = threshold
        self._spiking = False
        self._detector: Detector | None = None
        self._source = SourceClock()
        self._now_ns = 0
        self._next: int | None = None
        self._gather = Gather(1)

    def pull(self) -> list[Any]:
        frames: list[Any] = []
        for parts in super().pull():
            frame = self._decode(parts[-1])
            if frame is None:
                self.tally["unusable"] += 1
            else:
                frames.append(frame)
        if self._session is None and frames:
            self._spiking = isinstance(frames[0], self._broadband)
            self._source = SourceClock()
            self._source.take(frames[0].timestamp_ns, self.clock.now_ns())
            self._now_ns = self._source.ours_ns(frames[0].timestamp_ns)
        return frames

    def _decode(self, data: bytes) -> Any:
        """Decode a frame of either kind; None if it is neither."""
        from google.protobuf.message import DecodeError

        try:
            trains = self._trains.FromString(data)
            broadband = self._broadband.FromString(data)
        except DecodeError:
            return None
        if max(trains.timestamp_ns, trains.sequence_number) >= MOST:  # as in broadband
            return None
        if trains.bin_size_ms and len(trains.spike_counts):
            return trains
        return broadband if len(broadband.frame_data) else None

    def spiking(self) -> bool:
        return self._spiking

    def origin(self, now_ns: int) -> int:
        return self._now_ns

    def began(self) -> None:
        super().began()
        self._gather = Gather(self._gather.parts)

    def opened(self, session: Any) -> None:
        self._detector, self._next = None, None

    def hand_on(self, came: list[Any]) -> None:
        kind = self._broadband if self._spiking else self._trains
        frames = [frame for frame in came if isinstance(frame, kind)]
        self.tally["unusable"] += len(came) - len(frames)
        if self._spiking:
            self._samples(frames)
        else:
            for frame in frames:
                self._train(frame)

    # ---- spike trains ----------------------------------------------------------------------------

    def _train(self, frame: Any) -> None:
        counts = np.array(frame.spike_counts, np.float64)
        self.count_channels(len(counts))
        parts = self.model.bin_width * 1e3 / frame.bin_size_ms
        if round(parts) < 1 or abs(parts - round(parts)) > 1e-6:
            width = f"{self.model.bin_width * 1e3:g} ms"
            self.unusable(f"frames of {frame.bin_size_ms} ms do not make up bins of {width}")
            return
        if self._gather.parts != round(parts):
            self._gather = Gather(round(parts))
        labels = [str(channel) for channel in frame.channel_ids]
        columns = self.columns(labels, len(counts))
        gathered = self._gather.add(frame.sequence_number, counts)
        if gathered is None:
            self.tally["repeated"] += self._gather.repeated
            self._gather.repeated = 0
            return
        number, summed = gathered
        now = self.clock.now_ns()
        self.send_bin(SourceBin(summed[columns], frame.timestamp_ns / 1e9, now, number))

    # ---- broadband -------------------------------------------------------------------------------

    def _samples(self, frames: list[Any]) -> None:
        """Process runs of consecutive frames; samples between two runs are missing."""
        run: list[Any] = []
        for frame in frames:
            number, channels = frame.sequence_number, len(frame.frame_data)
            if self._next is not None and number < self._next and not self._fresh:
                self.tally["repeated"] += 1
                continue
            if self._next not in (None, number) or channels != self._channels:
                self._search(run)
                run = []
                if self._next is not None and number > self._next:
                    self.tally["lost"] += number - self._next
                    self.say(f"{spanned('frame', self._next, number - 1)} did not come")
                    self.skip()
                if number < (self._next or 0):
                    self._source.begin_again()
                    self._fresh = False
                if channels != self._channels:
                    self._detector = None
                self.count_channels(channels)
            run.append(frame)
            self._next = number + 1
        self._search(run)

    def _search(self, run: list[Any]) -> None:
        if not run:
            return
        rate = float(run[0].sample_rate_hz or 30000)
        if self._detector is None:
            self._detector = Detector(self._threshold, rate)
        if self._source.take(run[0].timestamp_ns, self.clock.now_ns()):
            self.tally["steps"] += 1
            self.say("the clock of the stream was set")
        values = np.array([frame.frame_data for frame in run], np.float64)
        samples, channels = self._detector.find(values)
        stamps = np.array([self._source.ours_ns(frame.timestamp_ns) for frame in run], np.int64)
        self.resume_at(int(stamps[0]), None)
        until = int(stamps[-1]) + 1
        self.send_spikes(stamps[samples], channels, now_ns=until, until_ns=until)
