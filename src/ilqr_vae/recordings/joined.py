"""Several sessions with different units as one recording, each unit recorded in its own session.

What the sessions share is then learnt from all of them; units of other sessions are not observed
(``Recording.observed``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.physical_units import in_units
from ilqr_vae.recordings.recording import Recording, Trials
from ilqr_vae.recordings.split import SplitSpec

SEPARATOR = "/"


def join(sessions: Mapping[str, Recording], split: SplitSpec) -> Recording:
    """Concatenate all training parts, then all validation parts, then all test parts.

    Each part begins with a break, so that nothing crosses between sessions. Units are named
    ``session/unit``; units of other sessions are not ``observed`` in a session's bins.

    Args:
        sessions: two or more by name, with the same bin width and kinematic channels; kinematics
            are converted to the units of the first.
        split: split of sessions without their own bounds.

    Raises:
        RecordingError: there are fewer than two sessions, or they differ in bin width or
            kinematics, or their units cannot be converted.
    """
    if len(sessions) < 2:
        raise RecordingError("recording", expected="two or more sessions", got=str(len(sessions)))
    first_name, first = next(iter(sessions.items()))
    for name, other in sessions.items():
        other.require_counts("sessions that are joined")
        _alike(first_name, first, name, other)
    sessions = {
        name: in_units(other, first.kinematic_units, first_name) for name, other in sessions.items()
    }
    spans = ("train", "validation", "test")
    parts = [
        (name, recording.slice(*split.span(span, recording)))
        for span in spans
        for name, recording in sessions.items()
        if split.span(span, recording)[1] > split.span(span, recording)[0]
    ]
    units = {name: recording.n_units for name, recording in sessions.items()}
    column = dict(zip(units, np.cumsum([0, *units.values()])[:-1].tolist(), strict=True))
    total, T = sum(units.values()), sum(len(part) for _, part in parts)
    counts = np.zeros((T, total), dtype=np.uint16)
    observed = np.zeros((T, total), dtype=bool)
    starts = np.cumsum([0, *(len(part) for _, part in parts)]).tolist()
    breaks: list[int] = []
    for start, (name, part) in zip(starts, parts, strict=False):
        rows = slice(start, start + len(part))
        columns = slice(column[name], column[name] + units[name])
        counts[rows, columns] = part.counts
        observed[rows, columns] = True if part.observed is None else part.observed
        breaks += [start, *(part.breaks + start).tolist()]
    lengths = [
        sum(span[1] - span[0] for r in sessions.values() for span in [split.span(s, r)])
        for s in spans
    ]
    kinematics = [part.kinematics for _, part in parts if part.kinematics is not None]
    return replace(
        first,
        counts=counts,
        unit_names=tuple(
            f"{name}{SEPARATOR}{unit}" for name, r in sessions.items() for unit in r.unit_names
        ),
        kinematics=np.concatenate(kinematics) if kinematics else None,
        start_time=0.0,
        trials=_trials([part for _, part in parts], starts),
        valid=np.concatenate([part.valid for _, part in parts]),
        scored=np.concatenate([part.scored for _, part in parts]),
        observed=observed,
        breaks=np.array(breaks[1:], dtype=np.int64),
        held_out=tuple(
            f"{name}{SEPARATOR}{unit}" for name, r in sessions.items() for unit in r.held_out
        ),
        bounds=(lengths[0], lengths[0] + lengths[1]),
        notes=tuple(f"{name}: {note}" for name, r in sessions.items() for note in r.notes),
        warnings=tuple(
            replace(warning, text=f"{name}: {warning.text}")
            for name, r in sessions.items()
            for warning in r.warnings
        ),
        name=", ".join(recording.name or name for name, recording in sessions.items()),
        sha256=hashlib.sha256(
            "".join(recording.sha256 for recording in sessions.values()).encode()
        ).hexdigest(),
    )


def _alike(first_name: str, first: Recording, name: str, other: Recording) -> None:
    for field, mine, theirs in (
        ("bin_width", f"{first.bin_width:.10g} s", f"{other.bin_width:.10g} s"),
        (
            "kinematics",
            ", ".join(first.kinematic_names) or "none",
            ", ".join(other.kinematic_names) or "none",
        ),
    ):
        if mine != theirs:
            raise RecordingError(
                f"recording.{field}",
                expected=f"{first_name}'s, {mine}, in every session",
                got=f"{theirs} in {name}",
            )


def _trials(parts: list[Recording], starts: list[int]) -> Trials | None:
    if any(part.trials is None for part in parts):
        return None
    each = [(start, part.trials) for start, part in zip(starts, parts, strict=False)]
    known = [(start, trials) for start, trials in each if trials is not None]
    shared = set.intersection(*(set(trials.events) for _, trials in known))
    conditions = tuple(c for _, trials in known for c in trials.condition)
    number = sum(len(trials) for _, trials in known)
    return Trials(
        start=np.concatenate([trials.start + start for start, trials in known]),
        stop=np.concatenate([trials.stop + start for start, trials in known]),
        condition=conditions if len(conditions) == number else (),
        events={
            name: np.concatenate([trials.events[name] + start for start, trials in known])
            for name in sorted(shared)
        },
    )
