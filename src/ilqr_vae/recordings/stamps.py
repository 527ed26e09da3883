"""Usable times of the samples of a behaviour series."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.recording import RecordingWarning

Array = NDArray[np.float64]

LOST_SAMPLES = 0.01
"""Largest share of samples without a usable time that may be dropped."""


def usable_stamps(
    times: NDArray[Any], n: int, field: str
) -> tuple[Array, NDArray[np.int64], tuple[RecordingWarning, ...]]:
    """Return increasing times of ``n`` samples, and which samples have one.

    Samples whose time is not finite, or not after the previous one, are dropped if they are few
    (``LOST_SAMPLES``, or two).

    Raises:
        RecordingError: the number or shape of times is wrong, or more are unusable.
    """
    raw = np.asarray(times)
    shape = "x".join(map(str, raw.shape))
    if raw.dtype.kind not in "iuf" or raw.size != n or max(raw.shape, default=0) != n:
        what = f"{shape or 'one'} of {raw.dtype}"
        raise RecordingError(field, expected=f"{n} times in seconds, one a sample", got=what)
    flat = raw.ravel().astype(np.float64)
    rows = np.flatnonzero(np.isfinite(flat))
    lost, allowed = n - len(rows), max(LOST_SAMPLES * n, min(2, n - 2))
    found: list[RecordingWarning] = []
    if lost > allowed:
        raise RecordingError(field, expected="finite seconds", got=f"{lost} of {n} that are not")
    if lost:
        text = f"{lost} of {n} samples of {field} have no finite time: left out."
        found.append(RecordingWarning("stamps-missing", text))
    back = np.flatnonzero(np.diff(flat[rows]) <= 0)
    if len(back):
        at = rows[back[0]], rows[back[0] + 1]
        kept = rows[_increasing(flat[rows])]
        text = (
            f"{len(rows) - len(kept)} of {n} times of {field} do not increase, the first from "
            f"{flat[at[0]]:.10g} to {flat[at[1]]:.10g} s at sample {at[1]}"
        )
        if len(rows) - len(kept) > allowed:
            raise RecordingError(field, expected="increasing seconds", got=text)
        found.append(RecordingWarning("stamps-order", f"{text}: these samples are left out."))
        rows = kept
    return flat[rows], rows, tuple(found)


def _increasing(values: Array) -> NDArray[np.int64]:
    """Return the indices of a longest strictly increasing subsequence."""
    ends: list[float] = []
    last: list[int] = []
    previous = np.full(len(values), -1, dtype=np.int64)
    for i, value in enumerate(values.tolist()):
        k = bisect_left(ends, value)
        previous[i] = last[k - 1] if k else -1
        ends[k : k + 1], last[k : k + 1] = [value], [i]
    chain = [last[-1]]
    while previous[chain[-1]] >= 0:
        chain.append(int(previous[chain[-1]]))
    return np.array(chain[::-1], dtype=np.int64)
