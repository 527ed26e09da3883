"""Adapt a model to other units from a few minutes of known behaviour.

The rows are fitted as without labels, but latents are also inferred from the behaviour. The
readout's map of the latents is then corrected by a ridge regression of its errors, in which the
latest bins have the largest weight. The penalty is chosen by cross-validation.

In a closed loop the intended velocity is not known, but the target is. ``intended`` takes the
decoded speed in the direction from the cursor to the target, and zero where the cursor is at the
target (ReFIT: Gilja et al. 2012, Nature Neuroscience 15:1752).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.adaptation.carried import fitted_rows, units_of
from ilqr_training.adaptation.units import Rows
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import Artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording

_FOLDS = 4
_RIDGES = tuple(float(a) for a in np.logspace(1, 5, 9))
_RUN_IN = 100


def intended(
    decoded: NDArray[np.float64],
    cursor: NDArray[np.float64],
    target: NDArray[np.float64],
    radius: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the intended kinematics, and the bins in which they are known.

    Args:
        decoded: (T, D) decoded kinematics. The first two channels are the velocity that moved the
            cursor; the others are returned as they are.
        cursor, target: (T, 2), NaN where there was no target.
        radius: (T,) of the target, in the same unit.

    Returns:
        (T, D), and (T,) bool.
    """
    toward = target - cursor
    distance = np.hypot(*toward.T)
    known = np.isfinite(distance) & np.isfinite(decoded).all(1)
    speed = np.hypot(*decoded[:, :2].T)
    away = distance > np.nan_to_num(radius)
    unit = toward / np.where(away, distance, 1.0)[:, None]
    made = np.nan_to_num(decoded)
    made[known, :2] = np.where(away[:, None], speed[:, None] * unit, 0.0)[known]
    return made, known


def adapt_with_labels(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    *,
    half_life: float = math.inf,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Artifact:
    """Fit the rows and correct the readout on bins with known behaviour.

    Args:
        recording: as for ``adapt``, with the model's kinematics.
        half_life: age in seconds at which a bin has half the weight in the correction.

    Raises:
        ConfigError: as for ``adapt``, or the recording lacks the model's kinematics.
    """
    if artifact.others:
        first, *others = (
            adapt_with_labels(m, recording, bins, half_life=half_life, seed=seed, progress=progress)
            for m in artifact.members
        )
        return replace(first, intervals=artifact.intervals, others=tuple(others))
    return labelled_rows(artifact, recording, bins, half_life, seed, progress)[0]


def labelled_rows(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    half_life: float,
    seed: int,
    progress: Progress,
    start: Rows | None = None,
) -> tuple[Artifact, Rows]:
    """Adapt one model; return it and its rows. ``start`` is as for ``units.refit``."""
    names = artifact.manifest.kinematic_names
    if artifact.readout is None or recording.kinematics is None or not names:
        raise ConfigError("labels", expected="a model and a recording with kinematics", got="none")
    if recording.kinematic_names != names:
        got = ", ".join(recording.kinematic_names)
        raise ConfigError("labels", expected=f"the model's channels {', '.join(names)}", got=got)
    part, behaviour = slice(*bins), None
    if "kinematics" in artifact.model.groups:
        centre, spread = artifact.readout.centre, artifact.readout.spread
        values = (torch.as_tensor(recording.kinematics[part]) - centre) / spread
        known = torch.as_tensor(recording.scored[part].astype(np.float64)).unsqueeze(1)
        behaviour = Observed(values, known.expand_as(values))
    units = units_of(artifact, recording, bins)
    made, rows = fitted_rows(artifact, units, recording, part, behaviour, seed, progress, start)
    return _corrected(made, recording, bins, half_life, progress), rows


def _corrected(
    made: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    half_life: float,
    progress: Progress,
) -> Artifact:
    """Add a ridge regression of the errors to the readout's map of the latents.

    The penalty is chosen by cross-validation in quarters of the bins. No correction is one of the
    choices.
    """
    readout, k = copy.deepcopy(made.readout), recording.kinematics
    assert readout is not None
    assert k is not None
    found = causal_pass(
        made.estimator(), recording, *bins, run_in=_RUN_IN, progress=progress, what="readout"
    )
    rows = np.flatnonzero(recording.scored[slice(*bins)])
    latents = (readout.shape.lags + 1) * readout.n
    x, error = found.window[rows, :latents], (k[slice(*bins)] - found.kinematics)[rows]
    error = error / readout.spread.numpy()
    age = (bins[1] - bins[0] - rows) * recording.bin_width
    weight = 0.5 ** (age / half_life)
    centre, scale = np.average(x, 0, weight), x.std(0) + 1e-9
    x = np.column_stack([(x - centre) / scale, np.ones(len(x))])

    def ridge(rows: NDArray[np.int64], alpha: float) -> NDArray[np.float64]:
        xw = x[rows] * weight[rows, None]
        gram = xw.T @ x[rows] + alpha * np.eye(x.shape[1])
        return np.asarray(np.linalg.solve(gram, xw.T @ error[rows]), dtype=np.float64)

    every = np.arange(len(x))
    losses = {math.inf: float((weight[:, None] * error**2).sum())}
    for alpha in _RIDGES if len(x) >= 2 * _FOLDS else ():
        left = np.concatenate(
            [
                error[fold] - x[fold] @ ridge(np.setdiff1d(every, fold), alpha)
                for fold in np.array_split(every, _FOLDS)
            ]
        )
        losses[alpha] = float((weight[:, None] * left**2).sum())
    alpha = min(losses, key=losses.__getitem__)
    if math.isfinite(alpha):
        w = ridge(every, alpha) * readout.spread.numpy()
        slope = w[:-1] / scale[:, None]
        readout.W[:, :latents] += torch.as_tensor(slope.T)
        readout.b += torch.as_tensor(w[-1] - centre @ slope)
    return replace(made, readout=readout)
