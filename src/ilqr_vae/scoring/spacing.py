"""Separation of segments, for decoders with a fixed history that do not know segments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.recordings.recording import Recording


def spaced_out(recording: Recording, gap: int) -> tuple[Recording, NDArray[np.int64]]:
    """Return the recording with ``gap`` invalid bins inserted before each break.

    A decoder with a history of at most ``gap`` bins then reads nothing of the previous segment.
    Inserted bins hold each unit's rounded mean count and are not ``valid``. For fitting; prediction
    is better done segment by segment (``Recording.segments``).

    Returns:
        The spaced recording, without trials; and int64 (T,), the new position of each bin.
    """
    n = len(recording)
    if not len(recording.breaks):
        return recording, np.arange(n)
    place = np.arange(n) + gap * np.searchsorted(recording.breaks, np.arange(n), side="right")
    total = int(place[-1]) + 1
    mean = np.rint(recording.counts[recording.valid].mean(0)) if recording.valid.any() else 0
    counts = np.broadcast_to(mean, (total, recording.n_units)).astype(np.uint16)
    counts[place] = recording.counts

    def flags(old: NDArray[np.bool_]) -> NDArray[np.bool_]:
        made = np.zeros((total, *old.shape[1:]), dtype=bool)
        made[place] = old
        return made

    kinematics = recording.kinematics
    if kinematics is not None:
        moved = np.zeros((total, kinematics.shape[1]))
        moved[place] = kinematics
        kinematics = moved
    return (
        replace(
            recording,
            counts=counts,
            kinematics=kinematics,
            trials=None,
            valid=flags(recording.valid),
            scored=flags(recording.scored),
            observed=None if recording.observed is None else flags(recording.observed),
            breaks=np.empty(0, dtype=np.int64),
            bounds=None,
        ),
        place,
    )
