"""The report of a streamed recording."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.sdk import Model
from ilqr_clients.span import Part
from ilqr_clients.stream import CROSSING, StreamLog
from ilqr_vae.errors import number_of
from ilqr_vae.protocol.clock import ClockOffset, ClockTrack
from ilqr_vae.recordings import Recording
from ilqr_vae.report import ReportData, distribution
from ilqr_vae.scoring.classes import ClassScores, score_classes
from ilqr_vae.scoring.score import OURS, WIENER, Scores, later_name, score_decodes

MISSES = ("degraded", "late")
_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay: bins [first, stop) of the part's recording were streamed, and scored from its
    start.

    Attributes:
        part: part of the recording; the Wiener filter is fitted on its training span.
        dropped: bool (stop - first,), bins that were not sent.
        speed: multiple of real time, or None for as fast as possible.
        deadline: deadline in seconds.
        others: (stop - first, D) decodes of rivals on the same bins, by name.
        changes: changes made during the run, as JSON; see ``ilqr_vae.simulated.disturbance``.
        clock: the service's clock before the first bin.
        lag: number of bins after which each was answered again; 0 for never.
    """

    part: Part
    model: Model
    first: int
    dropped: NDArray[np.bool_]
    speed: float | None
    deadline: float
    session: str
    clock: ClockOffset
    device: str
    command: str
    others: dict[str, NDArray[np.float64]] = field(default_factory=dict[str, Any])
    changes: tuple[dict[str, Any], ...] = ()
    lag: int = 0

    @property
    def recording(self) -> Recording:
        return self.part.recording

    @property
    def start(self) -> int:
        return self.part.start

    @property
    def stop(self) -> int:
        return self.part.stop

    @property
    def rows(self) -> slice:
        """The reported bins in the stream, without warm-up."""
        return slice(self.start - self.first, self.stop - self.first)

    def bits_per_spike(self, log: StreamLog) -> float:
        """Bits per spike on the bins of the part."""
        return log.bits_per_spike(np.flatnonzero(self.part.inside) - self.first)


def _scores(run: Replay, log: StreamLog) -> Scores | None:
    recording, names = run.recording, run.model.kinematic_names
    if recording.kinematics is None or not names:
        return None
    answered = np.isfinite(log.kinematics[run.rows]).all(axis=1)
    if not (answered & recording.scored[run.start : run.stop]).any():
        return None
    later = _later(run, log)
    return score_decodes(
        recording,
        run.part.split,
        bins=(run.start, run.stop),
        decoded=log.kinematics[run.rows],
        std=log.kinematics_std[run.rows],
        seen=~run.dropped[run.rows],
        fit_on=run.part.learnt_from,
        others={name: values[run.rows] for name, (values, _) in later.items()}
        | {name: values[run.rows] for name, values in run.others.items()},
        others_std={name: std[run.rows] for name, (_, std) in later.items()},
    )


def _later(run: Replay, log: StreamLog) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return decodes and deviations of fixed-lag answers by name, if there are any."""
    if not run.lag:
        return {}
    decoded, std = log.kinematics.copy(), log.kinematics_std.copy()
    for index, answer in log.revised.items():
        decoded[index], std[index] = answer.kinematics, answer.kinematics_std
    return {later_name(run.lag): (decoded, std)}


def _notes(run: Replay, log: StreamLog, scores: Scores | None) -> tuple[str, ...]:
    notes = [*run.part.notes, *run.recording.notes] + (
        list(scores.notes) if scores is not None else []
    )
    dropped = int(run.dropped[run.rows].sum())
    if dropped:
        notes.append(
            f"Left out on purpose: {number_of(dropped, 'bin')}; the Wiener filter was given the "
            "training mean there."
        )
    if run.changes:
        said = "; ".join(
            " ".join(f"{name} {value}" for name, value in change.items())
            for change in run.changes[:_SHOWN]
        )
        more = len(run.changes) - _SHOWN
        notes.append(f"Changed on purpose: {said}{f'; and {more} more' if more > 0 else ''}.")
    if log.refused:
        refused = number_of(log.refused, "bin")
        notes.append(f"The service refused {refused}: faster than it takes them.")
    if log.unbridged:
        lost = number_of(log.unbridged, "bin")
        notes.append(f"No answers for {lost} in gaps too long for the service: it began anew.")
    if run.recording.kinematics is None:
        notes.append("The recording has no kinematics: nothing to score decodes on.")
    if not run.model.kinematic_names:
        notes.append("The model decodes no kinematics: latents and rates only.")
    if run.start == run.first and run.start > 0:
        notes.append("No bins were streamed before the span: the estimator started cold.")
    return tuple(notes)


def _unit_notes(ending: Ending) -> tuple[str, ...]:
    notes: list[str] = []
    if ending.flagged:
        names = ", ".join(f.replace(":", " (") + ")" for f in ending.flagged)
        notes.append(f"Units masked at the end, out of the model's own prediction: {names}.")
    if ending.unit_notices:
        shown = "; ".join(ending.unit_notices[:_SHOWN])
        more = len(ending.unit_notices) - _SHOWN
        notes.append(f"Changes of units: {shown}{f'; and {more} more' if more > 0 else ''}.")
    return tuple(notes)


def _facts(
    run: Replay, log: StreamLog, scores: Scores | None, total: dict[str, float]
) -> dict[str, str]:
    facts: dict[str, str] = {}
    if scores is not None:
        names = run.model.kinematic_names
        what = ", ".join(names) if len(names) <= 3 else f"{len(names)} channels"
        facts[f"causal R², mean of {what}"] = f"{scores.methods[OURS]['r2']:.3f}"
        if WIENER in scores.methods:
            facts["Wiener filter, same bins"] = f"{scores.methods[WIENER]['r2']:.3f}"
        facts["90 % interval covers"] = f"{100 * scores.methods[OURS]['coverage_90']:.1f} %"
    facts["bits per spike, one step ahead"] = f"{run.bits_per_spike(log):.3f}"
    if total["n"]:
        facts["p99 latency, send to answer"] = f"{total['p99']:.1f} ms"
    facts["missed deadlines"] = str(sum(log.status[run.rows].count(s) for s in MISSES))
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The state at the end of a run.

    Attributes:
        clock: the service's clock after the last bin.
        flagged: ``NAME:why`` of the units that were masked then.
        unit_notices: notices about units during the run.
        events: events of the session: the bin, counted from the first streamed one, and the name.
    """

    clock: ClockOffset
    flagged: tuple[str, ...] = ()
    unit_notices: tuple[str, ...] = ()
    events: tuple[tuple[int, str], ...] = ()


def _classes(run: Replay, log: StreamLog) -> ClassScores | None:
    names, probabilities = run.model.classes, log.table(log.classes, run.rows)
    if probabilities is None:
        return None
    labels = run.recording.labels(names)[run.start : run.stop]
    return score_classes(probabilities, labels, names)


def report_of(run: Replay, log: StreamLog, ending: Ending) -> ReportData:
    """Score a run and build its report, on the scored bins without warm-up."""
    rows = run.rows
    clock = ClockTrack(run.clock, ending.clock)
    scores = _scores(run, log)
    part = run.recording.slice(run.start, run.stop)
    units, names = part.without_features(), run.model.kinematic_names
    latency = log.latency_ms(rows, clock)
    crossing = dict.fromkeys(CROSSING, clock.uncertainty_ns / 1000000.0)
    elapsed = (log.ended_ns - log.started_ns) / 1e9
    bits = run.bits_per_spike(log)
    speed = "as fast as possible" if run.speed is None else f"{run.speed:g} x real time"
    deadline_ms = run.deadline * 1e3
    sha = run.recording.sha256
    return ReportData(
        title=f"Replay of {run.recording.name}",
        kind="replay",
        bin_width=run.recording.bin_width,
        start=part.start_time,
        counts=units.counts,
        status=tuple(log.status[rows]),
        latents=log.latent[rows],
        latents_std=log.latent_std[rows],
        rates=log.rates[rows, : units.n_units].astype(np.float64),
        inputs=log.table(log.inputs, rows),
        learning=run.model.learning,
        bits_per_spike=bits,
        unit_names=units.unit_names,
        names=names,
        units=run.model.kinematic_units,
        truth=part.kinematics if names else None,
        decoded=log.kinematics[rows] if names else None,
        decoded_std=log.kinematics_std[rows] if names else None,
        baselines={} if scores is None or scores.wiener is None else {WIENER: scores.wiener},
        trials=part.trials,
        events=tuple(
            (part.start_time + (at - (run.start - run.first)) * part.bin_width, name)
            for at, name in ending.events
        ),
        scores=scores,
        classes=_classes(run, log),
        latency_ms=latency,
        latency_uncertainty_ms=crossing,
        clock=str(clock),
        deadline_ms=deadline_ms,
        facts=_facts(run, log, scores, distribution(latency["total"])),
        provenance={
            "model": run.model.model_id,
            "recording": run.recording.name + (f", sha256 {sha}" if sha else ""),
            "span": f"{run.part.span}: bins {run.start} to {run.stop - 1}, "
            f"after {number_of(run.start - run.first, 'bin')} of warm-up",
            "speed": f"{speed}; {log.answered / max(elapsed, 1e-9):.1f} bins per second",
            "service": f"device {run.device}",
            "clock": str(clock),
            "versions": f"ilqr-vae {version('ilqr-vae')}, Python {platform.python_version()}, "
            f"numpy {np.__version__}",
            "command": run.command,
        },
        notes=_notes(run, log, scores) + _unit_notes(ending),
        warnings=run.recording.warnings,
        extra=_extra(run, log, elapsed)
        | {
            "clock": clock.to_json(),
            "flagged": list(ending.flagged),
            "unit_notices": list(ending.unit_notices),
        },
    )


def _extra(run: Replay, log: StreamLog, elapsed: float) -> dict[str, Any]:
    status = log.status[run.rows]
    return {
        "model": run.model.model_id,
        "recording": {
            "name": run.recording.name,
            "sha256": run.recording.sha256,
            "span": run.part.span,
            "first_streamed": run.first,
            "start": run.start,
            "stop": run.stop,
            "bins_of_span": int(run.part.inside.sum()),
            "dropped": int(run.dropped[run.rows].sum()),
        },
        "speed": run.speed,
        "seconds": elapsed,
        "bins_per_second": log.answered / max(elapsed, 1e-9),
        "misses": {name: status.count(name) for name in MISSES},
        "unanswered": status.count(""),
        "refused": log.refused,
        "unbridged": log.unbridged,
        "revised": len(log.revised),
        "solver": dict(log.solver),
        "iterations": distribution(log.iterations[log.iterations > 0]),
        "session": run.session,
        "changes": list(run.changes),
    }


def _inputs(log: StreamLog, rows: slice) -> NDArray[np.float64]:
    found = log.table(log.inputs, rows)
    return np.empty((len(log.status[rows]), 0)) if found is None else found


def arrays_of(run: Replay, log: StreamLog) -> dict[str, NDArray[Any]]:
    """Return the first answers to the scored bins, to compare runs; NaN if there is none."""
    rows = run.rows
    classes = log.table(log.classes, rows)
    return ({} if classes is None else {"classes": classes}) | {
        "index": np.arange(run.start, run.stop),
        "status": np.array(log.status[rows]),
        "kinematics": log.kinematics[rows],
        "kinematics_std": log.kinematics_std[rows],
        "latents": log.latent[rows],
        "latents_std": log.latent_std[rows],
        "bits": log.bits[rows],
        "spikes": log.spikes[rows],
        "inputs": _inputs(log, rows),
        "iterations": log.iterations[rows],
    }
