"""Plausibility checks of trials, their events and the windows cut around them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.recording import RecordingWarning

Array = NDArray[np.float64]


def check_trials(
    start: Array, stop: Array, begin: float, end: float, *, needed: bool
) -> list[RecordingWarning]:
    """Check K trials, NaN if unknown, of a recording from ``begin`` to ``end`` seconds.

    Args:
        needed: whether the recording is cut at its trials.

    Raises:
        RecordingError: most trials stop before they start, or, if needed, all lie outside the
            recording.
    """
    known = np.isfinite(start) & np.isfinite(stop)
    found: list[RecordingWarning] = []
    if not needed and not known.all():
        text = f"{int((~known).sum())} of {len(known)} trials have no start or no stop: left out."
        found.append(RecordingWarning("trials-unknown", text))
    start, stop = start[known], stop[known]
    n = len(start)
    if not n:
        return found

    def odd(name: str, bad: NDArray[np.bool_], text: str) -> None:
        if bad.any():
            found.append(RecordingWarning(name, f"{int(bad.sum())} of {n} trials {text}."))

    negative = stop < start
    if 2 * int(negative.sum()) > n:
        raise RecordingError(
            "trials.stop_time",
            expected="seconds after each trial's start_time",
            got=f"{int(negative.sum())} of {n} that lie before it, e.g. {stop[negative][0]:g} for "
            f"a start at {start[negative][0]:g} (a duration, or another clock?)",
        )
    odd("trials-negative", negative, "stop before they start: left out")
    odd("trials-empty", stop == start, "have no length: left out")
    outside = (stop < begin) | (start > end)
    if needed and outside.all():
        raise RecordingError(
            "trials.start_time",
            expected=f"trials within the recording, {begin:g} to {end:g} s (data.clocks.trials "
            "converts other units)",
            got=f"{n} trials from {start.min():g} to {stop.max():g} s",
        )
    if needed and float(np.median(stop - start)) > 2 * (end - begin):
        raise RecordingError(
            "trials.stop_time",
            expected=f"trials shorter than the recording, {begin:g} to {end:g} s "
            "(data.clocks.trials converts other units)",
            got=f"half of {n} trials longer than {float(np.median(stop - start)):g} s",
        )
    odd(
        "trials-outside",
        outside,
        f"lie outside the recording, {begin:g} to {end:g} s; they span {start.min():g} to "
        f"{stop.max():g} s",
    )
    odd("trials-order", np.diff(start) < 0, "start before the trial above them in the table")
    _, which, counts = np.unique(start, return_inverse=True, return_counts=True)
    odd("trials-coincide", counts[which] > 1, "start at the same time as another")
    if not needed:  # otherwise ``check_windows`` reports it
        order = np.argsort(start, kind="stable")
        latest = np.maximum.accumulate(stop[order])
        odd("trials-overlap", start[order][1:] < latest[:-1] - 1e-6, "begin before another ends")
    span = float(stop.max() - start.min())
    if n >= 10 and not outside.any() and span <= 0.05 * (end - begin):
        found.append(
            RecordingWarning(
                "trials-cover",
                f"All {n} trials lie within {span:.4g} s of {end - begin:.4g} s of recording: are "
                "their times seconds (data.clocks.trials)?",
            )
        )
    return found


def check_event(name: str, when: Array, start: Array, stop: Array) -> RecordingWarning | None:
    """Return warnings about the times of an event in seconds, one per trial.

    ``event-relative``: they are relative to the start of their trials; ``event-outside``: some lie
    outside their trials.
    """
    known = np.isfinite(when) & np.isfinite(start) & np.isfinite(stop) & (stop > start)
    when, start, stop = when[known], start[known], stop[known]
    if not len(when):
        return None
    slack = np.maximum(0.5 * (stop - start), 1.0)
    outside = (when < start - slack) | (when > stop + slack)
    n = int(outside.sum())
    if not n:
        return None
    within = (when[outside] >= -1e-6) & (when[outside] <= (stop - start)[outside] + 1e-6)
    said = f"{n} of {len(when)} times of {name} lie outside of their trials"
    if within.mean() > 0.9 and 2 * n >= len(when):
        return RecordingWarning(
            "event-relative",
            f"{said}: they look like seconds from each trial's start (data.trials.relative).",
        )
    return RecordingWarning(
        "event-outside",
        f"{said}, e.g. {when[outside][0]:g} s for one from "
        f"{start[outside][0]:g} to {stop[outside][0]:g} s.",
    )


def check_windows(begin: Array, length: Array) -> list[RecordingWarning]:
    """Check K windows in seconds that are to be cut out.

    Raises:
        RecordingError: they overlap so much that all parts of a split have the same bins.
    """
    order = np.argsort(begin, kind="stable")
    low, high = begin[order], (begin + length)[order]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], high[:-1]]))
    alone = float((high - np.maximum(low, before)).clip(0).sum())
    total = float(length.sum())
    if len(begin) > 1 and alone < 0.5 * total:
        raise RecordingError(
            "data.trials",
            expected="windows of trials that lie apart",
            got=f"{len(begin)} windows of {total:.4g} s in all that cover {alone:.4g} s: most lie "
            "over one another",
        )
    if total - alone > 1e-3 * total:
        return [
            RecordingWarning(
                "windows-overlap",
                f"Windows of trials overlap by {total - alone:.4g} of {total:.4g} s: bins of one "
                "are bins of another.",
            )
        ]
    return []
