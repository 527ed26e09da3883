"""The data of a report, and its JSON form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ShapeError
from ilqr_vae.protocol.messages import TRIAL_START
from ilqr_vae.recordings import RecordingWarning, Trials
from ilqr_vae.report.table import Table
from ilqr_vae.scoring.classes import ClassScores
from ilqr_vae.scoring.score import Scores

Array = NDArray[np.float64]

SCHEMA = 1
QUANTILES: tuple[tuple[str, float], ...] = (("p50", 50.0), ("p99", 99.0), ("p99.9", 99.9))


def distribution(values: NDArray[Any]) -> dict[str, float]:
    """Return n, p50, p99, p99.9 and max of the finite ``values``; n = 0 and NaN for none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return {"n": 0} | {name: float("nan") for name, _ in QUANTILES} | {"max": float("nan")}
    quantiles = np.percentile(finite, [q for _, q in QUANTILES])
    named = {name: float(v) for (name, _), v in zip(QUANTILES, quantiles, strict=True)}
    return {"n": int(finite.size)} | named | {"max": float(finite.max())}


@dataclass(frozen=True, slots=True)
class Reaches:
    """Cursor movements of a closed loop, from the go on, in metres.

    Attributes:
        paths: (L, 2) of each of K reaches.
        targets: (K, 2).
        success: K.
    """

    paths: tuple[Array, ...]
    targets: Array
    success: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A causal run over T consecutive bins, N units, n latents, D kinematic channels.

    Rows of bins that were not answered are NaN in ``decoded``, ``latents`` and ``latency_ms``.

    Attributes:
        title: heading, e.g. ``Replay of reach.nwb``.
        kind: ``replay`` or ``evaluate``.
        bin_width: seconds.
        start: seconds, left edge of the first bin on the recording's clock.
        counts: (T, N), spikes.
        status: T words: ok, degraded, late, missing, extrapolated; "" for not answered.
        latents: (T, n); latents_std: (T, n) or None.
        bits_per_spike: of the arriving bins one step ahead, NaN where unknown.
        unit_names: of the N units; empty where they have none.
        names, units: of the D channels; empty where the model decodes nothing.
        truth, decoded, decoded_std: (T, D) or None.
        baselines: (T, D) decodes of other decoders by name.
        trials: ranges of bins relative to the first, or None.
        events: what happened while it ran: seconds on the recording's clock, and its name.
        scores: from ``score_decodes``, or None where there is no truth.
        classes: scores of the discrete output, or None without one or without trials.
        latency_ms: milliseconds per bin (T,) by stage, e.g. solve, queue, wire, total.
        latency_uncertainty_ms: of the stages that go from one clock to another, how far they may
            be off.
        clock: how the two clocks were compared, for people; "" where one alone was read.
        deadline_ms: what ``total`` is held against, or None.
        rates: (T, N), expected spikes per bin, or None.
        inputs: (T, m), inferred inputs, NaN where not known, or None.
        learning: (step, value) by what was followed while training.
        cursor: reaches of a closed loop, by what moved the cursor; radius: metres, of a target.
        tables: further tables for the page; their numbers are in ``extra``.
        facts: short headline lines, label to value.
        provenance: label to value: model, recording hash, versions, command.
        notes: sentences a reader should know (what was dropped, what is missing).
        warnings: what is odd about the recording.
        extra: more for the JSON form alone.
    """

    title: str
    kind: str
    bin_width: float
    start: float
    counts: NDArray[Any]
    status: tuple[str, ...]
    latents: Array
    latents_std: Array | None = None
    bits_per_spike: float = float("nan")
    unit_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    truth: Array | None = None
    decoded: Array | None = None
    decoded_std: Array | None = None
    baselines: dict[str, Array] = field(default_factory=dict[str, Array])
    trials: Trials | None = None
    events: tuple[tuple[float, str], ...] = ()
    scores: Scores | None = None
    classes: ClassScores | None = None
    latency_ms: dict[str, Array] = field(default_factory=dict[str, Array])
    latency_uncertainty_ms: dict[str, float] = field(default_factory=dict[str, float])
    clock: str = ""
    deadline_ms: float | None = None
    rates: Array | None = None
    inputs: Array | None = None
    learning: dict[str, tuple[tuple[int, float], ...]] = field(
        default_factory=dict[str, tuple[tuple[int, float], ...]]
    )
    cursor: dict[str, Reaches] = field(default_factory=dict[str, Reaches])
    radius: float = 0.0
    tables: tuple[Table, ...] = ()
    facts: dict[str, str] = field(default_factory=dict[str, str])
    provenance: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        n_bins = len(self.counts)
        series: dict[str, NDArray[Any] | None] = {
            "latents": self.latents,
            "latents_std": self.latents_std,
            "truth": self.truth,
            "decoded": self.decoded,
            "decoded_std": self.decoded_std,
            "rates": self.rates,
            "inputs": self.inputs,
            **{f"baselines.{k}": v for k, v in self.baselines.items()},
            **{f"latency_ms.{k}": v for k, v in self.latency_ms.items()},
        }
        for name, values in series.items():
            if values is not None and len(values) != n_bins:
                raise ShapeError(f"report.{name}", expected=f"{n_bins} bins", got=str(len(values)))
        if len(self.status) != n_bins:
            raise ShapeError("report.status", expected=f"{n_bins} bins", got=str(len(self.status)))

    @property
    def time(self) -> Array:
        """(T,) seconds, left edge of each bin."""
        return self.start + np.arange(len(self.counts), dtype=np.float64) * self.bin_width

    @property
    def has_velocity(self) -> bool:
        """Whether the first two channels are velocities, which can be integrated to a path."""
        return len(self.units) >= 2 and all(u.strip().endswith("/s") for u in self.units[:2])

    @property
    def statuses(self) -> dict[str, int]:
        """Number of bins by status; ``unanswered`` for none."""
        return dict(Counter(s or "unanswered" for s in self.status).most_common())

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Events of the run, and starts and events of its trials where they are not among them:
        seconds and name, rising."""
        made = list(self.events)
        if self.trials is not None and not any(name == TRIAL_START for _, name in made):
            named = {"trial start": self.trials.start} | dict(self.trials.events)
            for name, bins in named.items():
                at = self.start + np.asarray(bins, np.float64) * self.bin_width
                made += [(t, name) for t in at[np.isfinite(at)].tolist()]
        end = self.start + len(self.counts) * self.bin_width
        return sorted((t, name) for t, name in made if self.start <= t < end)


def plain(value: Any) -> Any:
    """Return ``value`` with numpy scalars converted to Python's, and non-finite ones to None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
