"""What a lab would use instead, fitted and run on the same bins: a Kalman filter and a GRU.

The Wiener filter is scored in every report (``report.score``); these take longer and are asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ilqr_training.gru import GRUDecoder
from ilqr_vae.baselines import KalmanFilter
from ilqr_vae.errors import ShapeError
from ilqr_vae.metrics import r2
from ilqr_vae.recordings import Recording, SplitSpec

Array = NDArray[np.float64]
Say = Callable[[str, int, int], None]

KALMAN, GRU = "Kalman filter", "GRU"
_LONGEST_LAG_S = 0.2


def _states(recording: Recording, kinematics: Array) -> Array:
    """(T, 2D): the kinematics and their integrals, which begin at zero with each segment."""
    integral = np.zeros_like(kinematics)
    for a, b in recording.segments(0, len(recording)):
        integral[a:b] = np.cumsum(kinematics[a:b], axis=0) * recording.bin_width
    return np.concatenate([kinematics, integral], axis=1)


def _delayed(recording: Recording, counts: Array, lag: int) -> Array:
    """Counts of ``lag`` bins before, within each segment."""
    made = counts.copy()
    for a, b in recording.segments(0, len(recording)):
        made[a + lag : b] = counts[a : max(b - lag, a)]
    return made


def kalman(
    recording: Recording, split: SplitSpec, bins: tuple[int, int], seen: NDArray[np.bool_] | None
) -> Array:
    """Decodes (T, D) of [a, b) by a position-velocity Kalman filter, its lag chosen on validation.

    Missing bins are given the mean counts. Raises ShapeError: no kinematics, or none that vary.
    """
    if recording.kinematics is None:
        raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
    truth = np.nan_to_num(recording.kinematics)
    D = truth.shape[1]
    train, validation = split.span("train", recording), split.span("validation", recording)
    counts = recording.counts.astype(np.float64)
    mean = counts[slice(*train)][recording.scored[slice(*train)]].mean(axis=0)
    given = counts.copy()
    given[~(recording.valid if seen is None else recording.valid & seen)] = mean
    counts[~recording.valid] = mean
    states = _states(recording, truth)
    rows = np.arange(*validation)[recording.scored[slice(*validation)]]

    def decoded(filter_: KalmanFilter, shifted: Array) -> Array:
        parts = [filter_.predict(shifted[a:b]) for a, b in recording.segments(0, len(recording))]
        return np.concatenate(parts)[:, :D]

    scored: list[tuple[float, int, KalmanFilter]] = []
    for lag in range(int(_LONGEST_LAG_S / recording.bin_width) + 1):
        shifted = _delayed(recording, counts, lag)
        made = KalmanFilter.fit(shifted, states, train=train, valid=recording.scored)
        scored.append((r2(truth[rows], decoded(made, shifted)[rows]), -lag, made))
    _, minus, best = max(scored, key=lambda s: s[:2])
    return decoded(best, _delayed(recording, given, -minus))[slice(*bins)]


def decode_rivals(
    recording: Recording,
    split: SplitSpec,
    bins: tuple[int, int],
    seen: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
    say: Say = lambda what, done, of: None,
) -> dict[str, Array]:
    """Decodes (T, D) of the bins [a, b) by each rival; everything chosen on the validation part.

    Args:
        recording: all of it, with kinematics.
        seen: (recording's bins,), False where the decoders are not given the bin.
        seed: of the GRU.
        say: called with (what, done, of).

    Raises:
        ShapeError: no kinematics, or a part without a bin to fit or choose on.
    """
    say(KALMAN, 0, 1)
    made = {KALMAN: kalman(recording, split, bins, seen)}
    gru = GRUDecoder.fit(recording, split, seed=seed, progress=lambda i, n: say(GRU, i, n))
    made[GRU] = gru.predict(recording, *bins, seen=seen)
    if seen is not None and not bool(seen[slice(*bins)].all()):
        made[f"{GRU}, last bin held"] = gru.predict(recording, *bins, seen=seen, missing="last")
    return made
