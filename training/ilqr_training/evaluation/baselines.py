"""Baselines on the same bins: a Wiener filter, a Kalman filter and networks.

Each is fitted on the training part, its hyperparameters are chosen on the validation part, and the
choice is refitted on both, as for the model's readout. None can mask a unit, and only the Kalman
filter can skip a bin. ``Filling`` names what replaces missing counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ilqr_training.evaluation.gru import (
    GRID,
    LSTM_GRID,
    TRANSFORMER_GRID,
    GRUConfig,
    GRUDecoder,
)
from ilqr_training.readout.restarts import reaching
from ilqr_vae.errors import ShapeError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.baselines import KalmanFilter
from ilqr_vae.scoring.metrics import r2
from ilqr_vae.scoring.online import GRU as GRU
from ilqr_vae.scoring.online import KALMAN as KALMAN
from ilqr_vae.scoring.online import Rivals
from ilqr_vae.scoring.score import WIENER, fit_wiener, wiener_decodes

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Filling = Literal["zeros", "last value", "mean", "no update"]
Decode = Callable[[Array, tuple[int, int], Flags], Array]

_LONGEST_LAG_S = 0.2


GRUS, LSTM, TRANSFORMER = "GRU, mean of five", "LSTM", "Transformer"
GRIDS = {LSTM: LSTM_GRID, TRANSFORMER: TRANSFORMER_GRID}
_AVERAGED, _SEEDS_APART = 5, 101


def names_of(gru: bool, *, others: bool = False, transformer: bool = True) -> tuple[str, ...]:
    """Return the names of the baselines that are asked for.

    The GRU takes minutes to fit. The other networks take several times that, half of it for the
    transformer.
    """
    if not gru:
        return (WIENER, KALMAN)
    more = (GRUS, LSTM, *((TRANSFORMER,) if transformer else ())) if others else ()
    return (WIENER, KALMAN, GRU, *more)


@dataclass(frozen=True)
class Baseline:
    """A fitted decoder.

    Attributes:
        name: name for tables.
        validation_r2: mean R2 on the validation part of the fit on the training part.
        habit: default replacement for a missing bin.
        fillings: supported replacements.
        chosen: the chosen hyperparameters of a network, as text.
        seconds: time to fit all candidates and the final fit.
        answer_seconds: time to decode one more bin; NaN if not measured.
    """

    name: str
    validation_r2: float
    habit: Filling
    fillings: tuple[Filling, ...]
    _recording: Recording
    _mean: Array
    _decode: Decode
    chosen: str = ""
    seconds: float = math.nan
    answer_seconds: float = math.nan

    def decode(
        self,
        bins: tuple[int, int],
        *,
        counts: NDArray[Any] | None = None,
        missing: Flags | None = None,
        filling: Filling | None = None,
    ) -> Array:
        """Return causal decodes (stop - start, D) of the bins [start, stop).

        Args:
            counts: (T, N), used instead of the recording's.
            missing: (T, N), True for further missing counts; a row of True is a lost bin.
            filling: what replaces missing counts.

        Raises:
            ShapeError: this decoder does not support the filling.
        """
        how = filling or self.habit
        if how not in (*self.fillings, "mean"):
            raise ShapeError("filling", expected=f"one of {self.fillings}", got=how)
        absent = ~self._recording.mask()
        absent = absent if missing is None else absent | missing
        given = self._recording.counts if counts is None else counts
        seen = np.ones(len(absent), dtype=bool)
        if how == "no update":
            seen &= ~absent.all(axis=1)
        return self._decode(filled(given, absent, how, self._mean), bins, seen)


def filled(counts: NDArray[Any], missing: Flags, filling: Filling, mean: Array) -> Array:
    """Return counts (T, N) with missing values replaced.

    ``last value`` is the unit's last observed count, 0 before the first. ``no update`` uses the
    mean for single missing units; the decoder skips bins that are missing entirely.

    Args:
        missing: (T, N).
        mean: (N,) mean counts in the training part.
    """
    x = np.asarray(counts, dtype=np.float64)
    if filling == "zeros":
        return np.where(missing, 0.0, x)
    if filling != "last value":
        return np.where(missing, mean, x)
    last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(x))[:, None]), axis=0)
    return np.where(last >= 0, np.take_along_axis(x, np.maximum(last, 0), axis=0), 0.0)


def _wiener(recording: Recording, split: SplitSpec) -> Baseline:
    fitted = fit_wiener(recording, split)

    def decode(counts: Array, bins: tuple[int, int], _: Flags) -> Array:
        return wiener_decodes(fitted, recording, counts, bins)

    fillings: tuple[Filling, ...] = ("zeros", "last value", "mean")
    return Baseline(WIENER, fitted.validation_r2, "mean", fillings, recording, fitted.mean, decode)


def _states(recording: Recording, kinematics: Array) -> Array:
    """Return (T, 2D): the kinematics and their integrals, which start at zero in each segment."""
    integral = np.zeros_like(kinematics)
    for a, b in recording.segments():
        integral[a:b] = np.cumsum(kinematics[a:b], axis=0) * recording.bin_width
    return np.concatenate([kinematics, integral], axis=1)


def _delayed(recording: Recording, values: NDArray[Any], lag: int) -> NDArray[Any]:
    """Return the values ``lag`` bins before, within each segment."""
    made = values.copy()
    for a, b in recording.segments():
        made[a + lag : b] = values[a : max(b - lag, a)]
    return made


@dataclass(frozen=True)
class _Kalman:
    """A Kalman filter with position and velocity as its state, and a chosen lag."""

    best: KalmanFilter
    lag: int
    validation_r2: float
    mean: Array
    decoded: Callable[[KalmanFilter, Array, tuple[int, int], Flags], Array]


def _fit_kalman(recording: Recording, split: SplitSpec) -> _Kalman:
    if recording.kinematics is None:
        raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
    truth = np.nan_to_num(recording.kinematics)
    train, validation = split.span("train", recording), split.span("validation", recording)
    D, mean = truth.shape[1], recording.mean_counts(*train)
    counts = np.where(recording.mask(), recording.counts, mean)
    both = (min(train[0], validation[0]), max(train[1], validation[1]))
    states = _states(recording, truth)
    # the state does not evolve across segments
    valid = recording.scored.copy()
    valid[recording.breaks] = False
    scored = recording.scored[slice(*validation)]

    def decoded(kalman: KalmanFilter, x: Array, bins: tuple[int, int], seen: Flags) -> Array:
        used = reaching(recording.segments(), bins)
        parts = [
            kalman.predict(x[a:b], max(bins[0] - a, 0), b - a, seen=seen[a:b]) for a, b in used
        ]
        return np.concatenate(parts)[:, :D]

    every = np.ones(len(recording), dtype=bool)
    tried: list[tuple[float, int]] = []
    for lag in range(int(_LONGEST_LAG_S / recording.bin_width) + 1):
        x = _delayed(recording, counts, lag)
        made = KalmanFilter.fit(x, states, train=train, valid=valid)
        found = decoded(made, x, validation, every)[scored]
        tried.append((r2(truth[slice(*validation)][scored], found), -lag))
    score, minus = max(tried)
    best = KalmanFilter.fit(_delayed(recording, counts, -minus), states, train=both, valid=valid)
    return _Kalman(best, -minus, score, mean, decoded)


def _kalman(recording: Recording, split: SplitSpec) -> Baseline:
    fitted = _fit_kalman(recording, split)

    def decode(given: Array, bins: tuple[int, int], seen: Flags) -> Array:
        x, came = (_delayed(recording, v, fitted.lag) for v in (given, seen))
        return fitted.decoded(fitted.best, x, bins, came)

    fillings: tuple[Filling, ...] = ("no update", "mean")
    score, mean = fitted.validation_r2, fitted.mean
    return Baseline(KALMAN, score, "no update", fillings, recording, mean, decode)


def _networks(
    name: str, made: Sequence[GRUDecoder], recording: Recording, split: SplitSpec
) -> Baseline:
    """Return a baseline that is the mean of some networks, or one of them."""

    def decode(counts: Array, bins: tuple[int, int], _: Flags) -> Array:
        return np.mean([one.decode(recording, counts, bins) for one in made], axis=0)

    return Baseline(
        name,
        float(np.mean([one.validation_r2 for one in made])),
        "zeros",
        ("zeros", "last value"),
        recording,
        recording.mean_counts(*split.span("train", recording)),
        decode,
        chosen=f"{made[0].config.hidden} units, dropout {made[0].config.dropout:g}, "
        f"{', '.join(str(one.config.steps) for one in made)} steps",
        answer_seconds=sum(one.answer_seconds() for one in made),
    )


def _several(
    first: GRUDecoder, recording: Recording, split: SplitSpec, seed: int
) -> list[GRUDecoder]:
    """Return the network and others of the same candidate from other seeds."""
    return [
        first,
        *(
            GRUDecoder.fit(recording, split, seed=seed + _SEEDS_APART * k, grid=(first.candidate,))
            for k in range(1, _AVERAGED)
        ),
    ]


def fit_baselines(
    recording: Recording,
    split: SplitSpec,
    names: tuple[str, ...],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Baseline]:
    """Fit the named baselines, with all choices made on the validation part.

    Args:
        recording: the whole recording, with kinematics; features are not read.
        names: names of the baselines; the result keeps this order.
        seed: seed of the networks.

    Raises:
        ShapeError: no kinematics, or a part without a bin to fit or choose on.
    """
    recording = recording.without_features()

    @cache
    def network(grid: tuple[GRUConfig, ...]) -> GRUDecoder:
        return GRUDecoder.fit(recording, split, seed=seed, grid=grid, progress=progress)

    def networks(name: str) -> Baseline:
        made = [network(GRIDS.get(name, GRID))]
        if name == GRUS:
            made = _several(made[0], recording, split, seed)
        return _networks(name, made, recording, split)

    fits: dict[str, Callable[[], Baseline]] = {
        WIENER: lambda: _wiener(recording, split),
        KALMAN: lambda: _kalman(recording, split),
    }
    fitted: dict[str, Baseline] = {}
    for i, name in enumerate(names):
        progress("baselines", i, len(names), name)
        began = time.monotonic()
        made = fits[name]() if name in fits else networks(name)
        fitted[name] = replace(made, seconds=time.monotonic() - began)
    if GRUS in fitted and GRU in fitted:  # the first of them was fitted for the one
        whole = fitted[GRUS].seconds + fitted[GRU].seconds
        fitted[GRUS] = replace(fitted[GRUS], seconds=whole)
    progress("baselines", len(names), len(names))
    return fitted


def fit_rivals(
    recording: Recording,
    split: SplitSpec,
    *,
    steps: int,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Rivals:
    """A Kalman filter and a GRU that decode bin by bin without torch.

    The GRU is of one size, so that it is fitted in seconds.

    Args:
        recording: all of it, with kinematics.
        steps: gradient steps of the GRU.

    Raises:
        ShapeError: no kinematics, or a part without a bin to fit or choose on.
    """
    kalman = _fit_kalman(recording, split)
    candidate = GRUConfig(hidden=64, dropout=0.3, steps=steps, schedule=steps)
    gru = GRUDecoder.fit(recording, split, seed=seed, grid=(candidate,), progress=progress)
    return Rivals(
        bin_width=recording.bin_width,
        unit_names=recording.unit_names,
        kinematic_names=recording.kinematic_names,
        kalman=kalman.best,
        lag=kalman.lag,
        gru=gru.weights(),
    )
