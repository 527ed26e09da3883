"""Streams of the lab streaming layer, found by name and again after they vanish."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.protocol.clock import Clock

_CLOCK_S, _CORRECT_S, _FIRST_S, _POLL_S = 5.0, 0.1, 5.0, 0.01

Say = Callable[[str], None]


def load_pylsl() -> Any:
    """Import the package. Raises ConfigError if it or its library is not installed."""
    try:
        import pylsl
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            "bridge lsl",
            expected="the package pylsl; try: pip install '.[lsl]'",
            got=str(error) or "none",
        ) from error
    return pylsl


def lsl_minus_ours_s(pylsl: Any, clock: Clock) -> tuple[float, float]:
    """Return LSL's clock on this machine minus ours, and its uncertainty, in seconds."""
    spans: list[tuple[int, float, int]] = []
    for _ in range(5):
        spans.append((clock.now_ns(), float(pylsl.local_clock()), clock.now_ns()))
    before, there, after = min(spans, key=lambda s: s[2] - s[0])
    return there - (before + after) / 2e9, (after - before) / 2e9


@dataclass(frozen=True, slots=True)
class StreamSamples:
    """Received samples: values (S, C) or S rows of text, and stamps (S,) in seconds of the
    source.
    """

    values: Any
    stamps: NDArray[np.float64]


class NamedStream:
    """The stream of a given name, from any source.

    The inlet does not recover by itself, so a source that goes away is noticed at once. Samples
    that it sent before are still returned; then the stream is searched again.

    Args:
        pylsl: the package.
        name: name of the stream.
        say: receives a line for each event.

    Attributes:
        info: description of the current or last stream; None before the first.
        correction_s, uncertainty_s: offset from stamps to LSL's clock on this machine, and its
            uncertainty.
        found: number of times that a source was found.
        stampless: number of samples without a finite time stamp, which are left out.
    """

    def __init__(self, pylsl: Any, name: str, say: Say) -> None:
        self.name = name
        self.info: Any = None
        self.correction_s = self.uncertainty_s = 0.0
        self.found = self.stampless = 0
        self._pylsl, self._say = pylsl, say
        self._inlet: Any = None
        self._watch: Any = None
        self._resolver: Any = None
        self._gone = self._corrected = 0.0

    def look(self, timeout: float) -> bool:
        """Look for the stream if it is absent. Return whether it is present."""
        if self._inlet is not None:
            return True
        if self._resolver is None:  # a new resolver for each source: it has no stale entries
            self._resolver = self._pylsl.ContinuousResolver("name", self.name)
        end = time.monotonic() + timeout
        while not (found := self._resolver.results()):
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        self._resolver = None
        self._take(max(found, key=lambda info: info.created_at()))
        return self._inlet is not None

    def _take(self, info: Any) -> None:
        try:
            inlet = self._pylsl.StreamInlet(info, recover=True)
            inlet.open_stream(_FIRST_S)
            full = inlet.info(_FIRST_S)
            watch = self._pylsl.StreamInlet(info, max_buflen=1, recover=False)
            watch.open_stream(_FIRST_S)
        except (self._pylsl.util.LostError, self._pylsl.util.TimeoutError):
            return  # it has vanished again
        before, self.info = self.info, full
        self._inlet, self._watch = inlet, watch
        self.found += 1
        self._correct(_FIRST_S)
        back = f", back after {time.monotonic() - self._gone:.1f} s" if self._gone else ""
        channels = full.channel_count()
        self._say(
            f"stream {self.name!r} of {full.hostname()}{back}: {number_of(channels, 'channel')}, "
            f"clock {self.correction_s * 1e3:+.3f} ms ± {self.uncertainty_s * 1e3:.3f} ms"
        )
        if before is not None and before.channel_count() != channels:
            had = number_of(before.channel_count(), "channel")
            self._say(f"stream {self.name!r} had {had} before")

    def labels(self) -> list[str]:
        """Names of the channels; empty if the stream does not state them."""
        named = None if self.info is None else self.info.get_channel_labels()
        return [label or "" for label in named] if named else []

    def pull(self, timeout: float) -> StreamSamples | None:
        """Return new samples, waiting for the first; None if there are none."""
        if self._inlet is None:
            return None
        lost = self._lost()
        text = self.info.channel_format() == self._pylsl.cf_string
        values, stamps = self._inlet.pull_chunk(
            0.0 if lost else timeout, 4096, min_samples=1, as_numpy=not text
        )
        known = np.isfinite(stamps)
        if not known.all():
            self._say(
                f"stream {self.name!r}: {number_of((~known).sum(), 'sample')} without time stamp"
            )
            self.stampless += int((~known).sum())
            values = [value for value, k in zip(values, known, strict=True) if k]
            values, stamps = values if text else np.array(values), np.asarray(stamps)[known]
        if len(stamps):
            if not lost and time.monotonic() - self._corrected > _CLOCK_S:
                self._correct(_CORRECT_S)
            return StreamSamples(values, np.asarray(stamps, np.float64))
        if lost:
            self._say(f"stream {self.name!r} is gone")
            self._inlet, self._gone = None, time.monotonic()
        return None

    def _lost(self) -> bool:
        """Return whether the source has gone away."""
        if self._watch is not None:
            try:
                self._watch.pull_chunk(0.0)
            except self._pylsl.util.LostError:
                self._watch = None
        return self._watch is None

    def _correct(self, timeout: float) -> None:
        """Measure the clock offset again; keep the previous one if that fails."""
        from pylsl.lib import lib

        measure = lib.lsl_time_correction_ex
        measure.restype = ctypes.c_double
        remote, uncertainty, error = ctypes.c_double(), ctypes.c_double(), ctypes.c_int()
        correction = measure(
            self._inlet.obj,
            ctypes.byref(remote),
            ctypes.byref(uncertainty),
            ctypes.c_double(timeout),
            ctypes.byref(error),
        )
        self._corrected = time.monotonic()
        if error.value == 0:
            self.correction_s, self.uncertainty_s = float(correction), uncertainty.value
