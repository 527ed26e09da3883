"""The type of recordings: binned spike counts, with kinematics and trials.

Notation: T bins, N units, D kinematic channels. Of the units the last F may be features: continuous
channels, in units of their own. Bin t covers [start + t w, start + (t+1) w), w the
bin width; kinematics at bin t are what the subject did during bin t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, number_of


@dataclass(frozen=True, slots=True)
class RecordingWarning:
    """A warning about a recording that could be read.

    Attributes:
        name: stable, for programs, e.g. ``spikes-outside``.
        text: a sentence for people.
    """

    name: str
    text: str

    def __str__(self) -> str:
        return f"Warning [{self.name}]: {self.text}"


@dataclass(frozen=True, slots=True)
class Trials:
    """Trials as half-open bin ranges.

    Attributes:
        start: int64 (K,), first bin of each trial.
        stop: int64 (K,), one past the last bin.
        condition: str per trial, empty where unknown.
        events: float64 (K,) by name: when each event came, in bins (fractions allowed) on the
            recording's own bins; NaN if it did not occur.
        begin: float64 (K,), seconds on the recording's clock where each begins, of trials that are
            laid end to end; empty where they are where they ran, or it is not known.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    condition: tuple[str, ...] = ()
    events: Mapping[str, NDArray[np.float64]] = field(
        default_factory=dict[str, "NDArray[np.float64]"]
    )
    begin: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __len__(self) -> int:
        return len(self.start)

    def shifted(self, keep: NDArray[np.bool_], by: int) -> Trials:
        """Return the kept trials, with all bin indices reduced by ``by``."""
        return Trials(
            start=self.start[keep] - by,
            stop=self.stop[keep] - by,
            condition=tuple(c for c, k in zip(self.condition, keep, strict=False) if k),
            events={name: when[keep] - by for name, when in self.events.items()},
            begin=self.begin[keep] if len(self.begin) else self.begin,
        )


UNKNOWN = frozenset({"", "nan", "None"})
"""Labels that mean no condition."""


def _numbers_first(condition: str) -> tuple[bool, float, str]:
    """Sort key of conditions: numbers by value, then text."""
    try:
        return False, float(condition), condition
    except ValueError:
        return True, 0.0, condition


@dataclass(frozen=True, slots=True)
class Recording:
    """A binned recording.

    Attributes:
        counts: uint16 (T, N), spikes of each unit in each bin; float64 where there are features,
            finite also where they are not observed.
        bin_width: seconds.
        unit_names: N names, unique.
        kinematics: float64 (T, D) or None where the recording has none; never NaN.
        kinematic_names: D names, e.g. ("vx", "vy").
        kinematic_units: D units, e.g. ("m/s", "m/s").
        start_time: seconds, the left edge of bin 0 on the recording's clock.
        trials: bin ranges of trials, or None for a continuous recording.
        valid: bool (T,), False where the recording has a gap (the counts there are not data).
        scored: bool (T,), bins whose kinematics are learnt from and scored on; a subset of
            ``valid``.
        observed: bool (T, N), False where a unit was not recorded though others were; None where
            every unit was recorded throughout.
        breaks: int64 (B,), increasing: bins that do not follow in time on the bin before them.
            Nothing that looks back in time looks across one: see ``segments``.
        held_out: names of units kept back for co-smoothing.
        features: F, number of continuous channels; they are the last of the units.
        bounds: first bins after the training and the validation part, where the file's own split
            (or the trials' boundaries) decide; None leaves it to ``SplitSpec``.
        notes: sentences a reader should know (what was left out, and why).
        warnings: implausible contents (``plausible``); shown wherever notes are.
        name: name of the file, without its path.
        sha256: SHA-256 of the file; "" for a recording made in memory.
    """

    counts: NDArray[Any]
    bin_width: float
    unit_names: tuple[str, ...]
    kinematics: NDArray[np.float64] | None = None
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    start_time: float = 0.0
    trials: Trials | None = None
    valid: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    scored: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    observed: NDArray[np.bool_] | None = None
    breaks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    held_out: tuple[str, ...] = ()
    features: int = 0
    bounds: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()
    name: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.ndim != 2 or counts.shape[0] == 0 or counts.shape[1] == 0:
            raise RecordingError(
                "recording.counts",
                expected="bins x units with at least one of each",
                got=f"shape {counts.shape}",
            )
        wanted = np.float64 if self.features else np.uint16
        if counts.dtype != wanted:
            expected = np.dtype(wanted).name
            raise RecordingError("recording.counts", expected=expected, got=str(counts.dtype))
        if not (np.isfinite(self.bin_width) and self.bin_width > 0):
            raise RecordingError(
                "recording.bin_width", expected="seconds above zero", got=str(self.bin_width)
            )
        channels = len(self.kinematic_names)
        for what, names, n in (
            ("unit_names", self.unit_names, counts.shape[1]),
            ("kinematic_names", self.kinematic_names, channels),
        ):
            if len(names) != n or len(set(names)) != n:
                raise RecordingError(
                    f"recording.{what}",
                    expected=f"{n} unique names",
                    got=f"{len(names)} names, {len(set(names))} unique",
                )
        if self.valid.size == 0:
            object.__setattr__(self, "valid", np.ones(counts.shape[0], dtype=bool))
        object.__setattr__(
            self, "scored", self.valid & self.scored if self.scored.size else self.valid
        )
        for name, mask, shape in (
            ("valid", self.valid, counts.shape[:1]),
            ("scored", self.scored, counts.shape[:1]),
            ("observed", self.observed, counts.shape),
        ):
            if mask is not None and mask.shape != shape:
                raise RecordingError(f"recording.{name}", expected=str(shape), got=str(mask.shape))
        edges = np.concatenate([[0], self.breaks, [len(counts)]])
        if (np.diff(edges) <= 0).any():
            raise RecordingError(
                "recording.breaks",
                expected=f"increasing bins within 1 to {len(counts) - 1}",
                got=str(self.breaks[:5]),
            )
        if self.kinematics is not None:
            units = self.kinematic_units or ("",) * channels
            object.__setattr__(self, "kinematic_units", units)
            if len(units) != channels:
                raise RecordingError(
                    "recording.kinematic_units",
                    expected=f"{channels}, one a channel",
                    got=str(len(units)),
                )
            expected = (counts.shape[0], channels)
            if self.kinematics.shape != expected:
                raise RecordingError(
                    "recording.kinematics", expected=str(expected), got=str(self.kinematics.shape)
                )
            if not np.isfinite(self.kinematics).all():
                raise RecordingError(
                    "recording.kinematics",
                    expected="finite values",
                    got=f"{int((~np.isfinite(self.kinematics)).sum())} that are not",
                )

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    @property
    def n_units(self) -> int:
        """N, the features among them."""
        return int(self.counts.shape[1])

    @property
    def counted(self) -> int:
        """Number of units whose spikes are counted: all but the features."""
        return self.n_units - self.features

    def without_features(self) -> Recording:
        """Return the recording without its features."""
        if not self.features:
            return self
        return self.select_units(self.unit_names[: -self.features])

    def require_counts(self, what: str) -> None:
        """Raise RecordingError if there are features, which ``what`` does not support."""
        if self.features:
            got = ", ".join(self.unit_names[-self.features :])
            raise RecordingError("data.features", expected=f"none for {what}", got=got)

    def segments(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Return the contiguous ranges of bins [start, stop)."""
        stop = len(self) if stop is None else stop
        inside = self.breaks[(self.breaks > start) & (self.breaks < stop)]
        edges = [start, *inside.tolist(), stop]
        return [(a, b) for a, b in pairwise(edges) if b > a]

    def mask(self) -> NDArray[np.bool_]:
        """Return a mask (T, N), True where a count is data."""
        whole = np.broadcast_to(self.valid[:, None], self.counts.shape)
        return whole if self.observed is None else whole & self.observed

    def conditions(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the known conditions of the trials that begin in [start, stop), in order."""
        if self.trials is None:
            return ()
        inside = ((self.trials.start >= start) & (self.trials.start < stop)).tolist()
        found = {c for c, one in zip(self.trials.condition, inside, strict=False) if one}
        return tuple(sorted(found - UNKNOWN, key=_numbers_first))

    def labels(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return (T,), the index in ``names`` of the condition of each bin's trial; -1 outside
        trials and for other conditions."""
        place = {name: k for k, name in enumerate(names)}
        found = np.full(len(self), -1, dtype=np.int64)
        if self.trials is not None:
            bounds = zip(self.trials.start.tolist(), self.trials.stop.tolist(), strict=True)
            for (start, stop), condition in zip(bounds, self.trials.condition, strict=False):
                found[max(start, 0) : stop] = place.get(condition, -1)
        return found

    def require_bin_width(self, seconds: float) -> None:
        """Raise RecordingError if the bin width differs from a model's."""
        if abs(self.bin_width - seconds) > 1e-9:
            raise RecordingError(
                "recording.bin_width",
                expected=f"the model's {seconds:.10g} s",
                got=f"{self.bin_width:.10g} s",
            )

    def mean_counts(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return each unit's mean count (N,) over the bins of [start, stop) where it was
        observed.
        """
        seen = self.mask()[start:stop]
        spikes = np.where(seen, self.counts[start:stop], 0).sum(0, dtype=np.float64)
        return spikes / np.maximum(seen.sum(0), 1)

    def slice(self, start: int, stop: int) -> Recording:
        """Return bins [start, stop) as a recording; trials entirely inside are kept and shifted."""
        trials = self.trials
        if trials is not None:
            trials = trials.shifted((trials.start >= start) & (trials.stop <= stop), start)
        inside = (self.breaks > start) & (self.breaks < stop)
        return replace(
            self,
            counts=self.counts[start:stop],
            kinematics=None if self.kinematics is None else self.kinematics[start:stop],
            start_time=self.start_time + start * self.bin_width,
            trials=trials,
            valid=self.valid[start:stop],
            scored=self.scored[start:stop],
            observed=None if self.observed is None else self.observed[start:stop],
            breaks=self.breaks[inside] - start,
            bounds=None,
        )

    def select_units(self, names: tuple[str, ...]) -> Recording:
        """Return the recording with the named units, in this order.

        Raises:
            RecordingError: a name is not in the recording.
        """
        index = {name: i for i, name in enumerate(self.unit_names)}
        missing = [name for name in names if name not in index]
        if missing:
            raise RecordingError(
                "recording.unit_names",
                expected=f"the model's {number_of(len(names), 'unit')}",
                got=f"{len(missing)} of them absent, e.g. {missing[0]!r}",
            )
        columns = [index[name] for name in names]
        continuous = [column >= self.counted for column in columns]
        features = sum(continuous)
        if continuous != sorted(continuous):
            expected, got = "features after all units", ", ".join(names[:8])
            raise RecordingError("recording.unit_names", expected=expected, got=got)
        counts = self.counts[:, columns]
        return replace(
            self,
            counts=counts if features or not self.features else counts.astype(np.uint16),
            features=features,
            unit_names=tuple(names),
            observed=None if self.observed is None else self.observed[:, columns],
            held_out=tuple(name for name in self.held_out if name in set(names)),
        )
