"""The one recording type: binned spike counts with what was measured beside them.

Notation: T bins, N units, D kinematic channels. Bin t covers [start + t w, start + (t+1) w), w the
bin width; kinematics at bin t are what the subject did during bin t.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError


@dataclass(frozen=True, slots=True)
class Trials:
    """Trials as half-open bin ranges.

    Attributes:
        start: int64 (K,), first bin of each trial.
        stop: int64 (K,), one past the last bin.
        condition: str per trial, empty where unknown.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    condition: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True)
class Recording:
    """A binned recording.

    Attributes:
        counts: uint16 (T, N), spikes of each unit in each bin.
        bin_width: seconds.
        unit_names: N names, unique.
        kinematics: float64 (T, D) or None where the recording has none; never NaN.
        kinematic_names: D names, e.g. ("vx", "vy").
        kinematic_units: D units, e.g. ("m/s", "m/s").
        start_time: seconds, the left edge of bin 0 on the recording's clock.
        trials: bin ranges of trials, or None for a continuous recording.
        valid: bool (T,), False where the recording has a gap (the counts there are not data).
        name: what to call it (the file's name, not its path).
        sha256: of the file it came from, "" when made in memory.
    """

    counts: NDArray[np.uint16]
    bin_width: float
    unit_names: tuple[str, ...]
    kinematics: NDArray[np.float64] | None = None
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    start_time: float = 0.0
    trials: Trials | None = None
    valid: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
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
        if counts.dtype != np.uint16:
            raise RecordingError("recording.counts", expected="uint16", got=str(counts.dtype))
        if not (np.isfinite(self.bin_width) and self.bin_width > 0):
            raise RecordingError(
                "recording.bin_width", expected="seconds above zero", got=str(self.bin_width)
            )
        if len(self.unit_names) != counts.shape[1] or len(set(self.unit_names)) != counts.shape[1]:
            raise RecordingError(
                "recording.unit_names",
                expected=f"{counts.shape[1]} unique names",
                got=f"{len(self.unit_names)} names, {len(set(self.unit_names))} unique",
            )
        if self.valid.size == 0:
            object.__setattr__(self, "valid", np.ones(counts.shape[0], dtype=bool))
        if self.valid.shape != (counts.shape[0],):
            raise RecordingError(
                "recording.valid", expected=f"({counts.shape[0]},)", got=str(self.valid.shape)
            )
        if self.kinematics is not None:
            expected = (counts.shape[0], len(self.kinematic_names))
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
        return int(self.counts.shape[1])

    def slice(self, start: int, stop: int) -> Recording:
        """Bins [start, stop) as a recording of its own; trials wholly inside are kept, shifted."""
        trials = self.trials
        if trials is not None:
            keep = (trials.start >= start) & (trials.stop <= stop)
            trials = Trials(
                start=trials.start[keep] - start,
                stop=trials.stop[keep] - start,
                condition=tuple(c for c, k in zip(trials.condition, keep, strict=False) if k),
            )
        return replace(
            self,
            counts=self.counts[start:stop],
            kinematics=None if self.kinematics is None else self.kinematics[start:stop],
            start_time=self.start_time + start * self.bin_width,
            trials=trials,
            valid=self.valid[start:stop],
        )

    def select_units(self, names: tuple[str, ...]) -> Recording:
        """The named units, in the order named.

        Raises:
            RecordingError: a name is not in the recording.
        """
        index = {name: i for i, name in enumerate(self.unit_names)}
        missing = [name for name in names if name not in index]
        if missing:
            raise RecordingError(
                "recording.unit_names",
                expected=f"the model's {len(names)} units",
                got=f"{len(missing)} of them absent, e.g. {missing[0]!r}",
            )
        columns = [index[name] for name in names]
        return replace(self, counts=self.counts[:, columns], unit_names=tuple(names))
