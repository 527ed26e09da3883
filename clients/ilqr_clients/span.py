"""The bins of a recording that a replay streams, and those that it scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.connection import Model
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import Recording, RecordingSpec, SplitSpec, load_matching
from ilqr_vae.recordings.split import Span
from ilqr_vae.recordings.trials import in_course


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A span of a recording in its original order.

    Attributes:
        recording: the whole recording, with only the model's units, ``scored`` within the span.
        span: name of the span.
        start, stop: half-open range of bins that contains the span.
        inside: bool (T,), bins of the span. Bins between its trials are streamed but not scored.
        learnt_from: recording for fitting baselines, to which ``split`` refers.
        notes: notes for the report.
    """

    recording: Recording
    span: Span
    start: int
    stop: int
    inside: NDArray[np.bool_]
    learnt_from: Recording
    split: SplitSpec
    notes: tuple[str, ...] = ()


def part_of(model: Model, path: Path, spec: RecordingSpec, span: Span) -> Part:
    """Return a span of a recording for streaming, by trials if the model was trained on trials.

    Raises:
        RecordingError: the recording cannot be read for the model, or the span has no bin.
    """
    ran = spec.as_it_ran()
    course = load_matching(path, ran, model)
    notes: tuple[str, ...] = ()
    if spec.mode == "trials":
        try:
            windows = load_matching(path, spec, model)
        except RecordingError as error:
            notes = (f"The {span} span is by time, as it has no trials as in training: {error}.",)
        else:
            return _of_trials(course, windows, spec, span)
    start, stop = ran.split.occupied(span, course)
    inside = np.zeros(len(course), dtype=bool)
    inside[start:stop] = True
    return Part(
        recording=course,
        span=span,
        start=start,
        stop=stop,
        inside=inside,
        learnt_from=course,
        split=ran.split,
        notes=notes,
    )


def _of_trials(course: Recording, windows: Recording, spec: RecordingSpec, span: Span) -> Part:
    recording, inside = course, np.ones(len(course), dtype=bool)
    notes: tuple[str, ...] = ()
    if span != "all":
        recording, inside = in_course(course, windows, spec.split.occupied(span, windows))
    if not inside.any():
        raise RecordingError(
            "recording", expected=f"trials of the {span} span on its bins", got="none"
        )
    rows = np.flatnonzero(inside)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if span != "all":
        trials = recording.trials
        notes = (
            f"Scores and bits per spike are of the {len(rows)} bins inside "
            f"{0 if trials is None else len(trials)} trials of the {span} part; the other "
            f"{stop - start - len(rows)} between them, other parts' trials among them, were "
            "streamed and not scored.",
        )
    return Part(
        recording=recording,
        span=span,
        start=start,
        stop=stop,
        inside=inside,
        learnt_from=windows,
        split=spec.split,
        notes=notes,
    )
