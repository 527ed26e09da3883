"""The source of a replay that can be steered: plays a span of a recording."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.span import Part
from ilqr_clients.steering import Steering
from ilqr_clients.stream import MOST_BINS, NextBin, seen
from ilqr_vae.protocol.messages import TRIAL_START as START
from ilqr_vae.protocol.messages import TRIAL_STOP as STOP
from ilqr_vae.recordings import Recording
from ilqr_vae.simulated.disturbance import Mask

Array = NDArray[np.float64]


@dataclass
class Played:
    """The played bins of a stream; at most ``MOST_BINS``.

    Attributes:
        rows: bins of the recording.
        counts: (N,) counts as sent, features last; zeros if nothing was sent.
        mask: (N,), True where observed; all False if nothing was sent.
        decoders: (D,) decodes of each rival.
    """

    rows: list[int] = field(default_factory=list[int])
    counts: list[NDArray[Any]] = field(default_factory=list["NDArray[Any]"])
    mask: list[NDArray[np.bool_]] = field(default_factory=list["NDArray[np.bool_]"])
    decoders: dict[str, list[Array]] = field(default_factory=dict[str, "list[Array]"])

    def add(self, row: int, given: tuple[NDArray[Any], Mask | None] | None, units: int) -> None:
        """Add a bin: its row in the recording, and what was sent."""
        counts, mask = given or (np.zeros(units, dtype=np.uint16), np.zeros(units, dtype=bool))
        self.rows.append(row)
        self.counts.append(counts)
        self.mask.append(np.ones(units, dtype=bool) if mask is None else mask)


class Player:
    """The bins of a recording, with the disturbances, order and times of its steering.

    Args:
        recording: recording to play entirely.
        steering: how to play it.
        interval: seconds between bins; None for as fast as credits allow.
        dropped: bool (T,), bins of the stream that are never sent.

    Attributes:
        played: bins played so far.
    """

    def __init__(
        self,
        recording: Recording,
        steering: Steering,
        interval: float | None,
        dropped: Mask | None = None,
    ) -> None:
        self._recording, self._steering, self._dropped = recording, steering, dropped
        self._mask = recording.mask()
        self._step_ns = None if interval is None else round(interval * 1e9)
        self._row = self._index = 0
        self._base_ns: int | None = None
        self._paused_ns: int | None = None
        self._sent_ns = 0
        self._upcoming: NextBin | None = None
        self._marks = _marks_of(recording)
        self.played = Played()

    @property
    def ended(self) -> bool:
        at_end = self._row >= len(self._recording) and not self._steering.loop
        return at_end and self._upcoming is None and not self._steering.paused

    def sent(self) -> None:
        self._upcoming = None

    def next(self, now_ns: int) -> NextBin | None:
        if self._base_ns is None:
            self._base_ns = now_ns + min(self._step_ns or 0, 50_000_000)
        while self._upcoming is None and not self._changed(now_ns):
            if self._row >= len(self._recording):
                if not self._steering.loop:
                    return None
                self._row = 0
            self._upcoming = self._made(now_ns)
        return self._upcoming

    def _changed(self, now_ns: int) -> bool:
        """Apply the changes due at the next bin; return True while paused."""
        width = self._recording.bin_width
        assert self._base_ns is not None
        for change in self._steering.begin(self._index):
            if change.seek is not None:
                last = len(self._recording) - 1
                self._row = int(np.clip(round(change.seek / width), 0, last))
            if change.pause and self._step_ns is not None:
                self._base_ns += round(change.pause * 1e9)
        if self._steering.paused:
            self._paused_ns = self._paused_ns or now_ns
        elif self._paused_ns is not None:
            self._base_ns += now_ns - self._paused_ns
            self._paused_ns = None
        return self._steering.paused

    def _made(self, now_ns: int) -> NextBin | None:
        """Return the bin of the next row; None if it is dropped."""
        row, index = self._row, self._index
        self._row, self._index = row + 1, index + 1
        mask = seen(self._mask[row])
        steering = self._steering
        lost = self._dropped is not None and index < len(self._dropped) and self._dropped[index]
        counts, units = self._recording.counts[row], self._recording.counted
        of_units = None if mask is None else mask[:units]
        given = None if lost else steering.disturb(index, counts[:units], of_units)
        others = steering.decode(None) if given is None else steering.decode(*given)
        if given is not None and self._recording.features:  # which nothing disturbs
            there = np.ones(units, dtype=bool) if given[1] is None else given[1]
            given = (
                np.concatenate([given[0], counts[units:]]),
                np.concatenate([there, self._mask[row, units:]]),
            )
        delay = steering.settings.latency
        later = min(row + round(delay / self._recording.bin_width), len(self._recording) - 1)
        truth = self._recording.kinematics
        steering.tell(
            index,
            position=row * self._recording.bin_width,
            truth=None if truth is None else truth[later],
            decoders=others or None,
        )
        if self._step_ns is not None:
            assert self._base_ns is not None
            began_ns = self._base_ns + (index - 1) * self._step_ns
            for name, payload, share in self._marks.get(row, ()):
                steering.mark(name, payload, began_ns + round(share * self._step_ns))
        if len(self.played.rows) < MOST_BINS:
            self.played.add(row, given, self._recording.n_units)
            for name, decoded in others.items():
                self.played.decoders.setdefault(name, []).append(decoded)
        if given is None:
            return None
        if self._step_ns is None:
            return NextBin(index, given[0], given[1], now_ns, None)
        assert self._base_ns is not None
        intended = self._base_ns + index * self._step_ns
        self._sent_ns = max(self._sent_ns, intended + round(delay * 1e9))
        return NextBin(index, given[0], given[1], intended, self._sent_ns)


def _marks_of(recording: Recording) -> dict[int, list[tuple[str, dict[str, Any], float]]]:
    """Return starts, stops and events of trials by bin: name, payload, and offset in the bin."""
    made: dict[int, list[tuple[str, dict[str, Any], float]]] = {}
    trials = recording.trials
    if trials is None:
        return made
    for k in range(len(trials)):
        about: dict[str, Any] = {"trial": k}
        about |= {"condition": trials.condition[k]} if trials.condition else {}
        made.setdefault(int(trials.start[k]), []).append((START, about, 0.0))
        for name, when in trials.events.items():
            if np.isfinite(when[k]):
                bin_, share = divmod(float(when[k]), 1.0)
                made.setdefault(int(bin_), []).append((name[:64], about, share))
        made.setdefault(int(trials.stop[k]) - 1, []).append((STOP, {}, 1.0))
    return {bin_: sorted(marks, key=lambda mark: mark[2]) for bin_, marks in made.items()}


def as_played(part: Part, first: int, played: Played) -> tuple[Part, NDArray[np.bool_]]:
    """Return the span as played, for a report: a recording of the streamed bins.

    Args:
        part: the part that was played.
        first: first bin of its recording that was played.
        played: rows count from ``first``.

    Returns:
        The part, which starts at the first scored bin, and a mask (T,) of bins that were not sent.
    """
    recording, rows = part.recording, np.array(played.rows) + first
    jumps = np.flatnonzero(np.diff(rows) != 1) + 1
    in_order = recording.slice(int(rows[0]), int(rows[0]) + len(rows)) if not len(jumps) else None
    mask = np.array(played.mask)
    came = np.array([bool(row.any()) for row in played.mask])
    streamed = replace(
        recording,
        counts=np.array(played.counts).astype(recording.counts.dtype, copy=False),
        kinematics=None if recording.kinematics is None else recording.kinematics[rows],
        start_time=recording.start_time + int(rows[0]) * recording.bin_width,
        trials=None if in_order is None else in_order.trials,
        valid=recording.valid[rows],
        scored=recording.scored[rows],
        observed=mask,
        breaks=jumps if in_order is None else in_order.breaks,
        bounds=None,
    )
    inside = part.inside[rows]
    start = int(np.argmax(inside)) if inside.any() else 0
    changed: dict[str, Any] = {"recording": streamed, "inside": inside, "start": start}
    return replace(part, **changed, stop=len(rows)), ~came
