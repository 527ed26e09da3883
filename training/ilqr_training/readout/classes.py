"""Fitting ``ilqr_vae.model.classes``: multinomial logistic regression, calibrated on held-out bins.

The classes are the conditions of the trials in the training part. The regression is fitted to
causal latents on the bins of these trials. Its penalty is the one with the lowest log loss on the
validation part after temperature scaling (Guo et al. 2017), which divides all logits by the T that
minimises that loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ilqr_training.fit.crops import Prepared
from ilqr_training.readout.causal import Causal
from ilqr_vae.errors import RecordingError
from ilqr_vae.model.classes import ClassReadout

Array = NDArray[np.float64]

MOST_CLASSES = 100
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse penalties to try; features have unit standard deviation."""
_LOG_T = (-3.0, 5.0)


class ClassFit(NamedTuple):
    """A fitted discrete output.

    Attributes:
        names: names of the C classes.
        readout: weights.
    """

    names: tuple[str, ...]
    readout: ClassReadout


def class_names(data: Prepared) -> tuple[str, ...]:
    """Return the conditions of the trials in the training part, in order.

    Raises:
        RecordingError: there are fewer than two or more than ``MOST_CLASSES``, or the validation
            part has no trial of them.
    """
    recording = data.recording
    found = recording.conditions(*data.train)
    if not 2 <= len(found) <= MOST_CLASSES:
        raise RecordingError(
            "readout.classes",
            expected=f"trials of 2 to {MOST_CLASSES} conditions in the training part "
            "(data.trials.condition names their columns)",
            got=f"{len(found)}: {', '.join(found[:4]) or 'none'}{', ...' if found[4:] else ''}",
        )
    if not (_labels(data, data.validation, found) >= 0).any():
        raise RecordingError(
            "readout.classes",
            expected="trials of these conditions in the validation part, to calibrate on",
            got="none",
        )
    return found


def _labels(data: Prepared, span: tuple[int, int], names: tuple[str, ...]) -> NDArray[np.int64]:
    labels = data.recording.labels(names)[slice(*span)]
    return np.where(data.recording.valid[slice(*span)], labels, -1)


def fit_classes(
    train: Causal, held: Causal, data: Prepared, features: int
) -> tuple[ClassFit, float]:
    """Fit the discrete output; also return its accuracy on the bins of the validation part.

    Args:
        features: number of first columns of the window to read.

    Raises:
        RecordingError: see ``class_names``.
    """
    names = class_names(data)
    label, other = (_labels(data, span, names) for span in (data.train, data.validation))
    x, y = train.window[label >= 0, :features], label[label >= 0]
    seen, truth = held.window[other >= 0, :features], other[other >= 0]
    centre, scale = x.mean(0), x.std(0) + 1e-9
    best: tuple[float, Array, Array] | None = None
    for W, b in _regressions((x - centre) / scale, y):
        logits = ((seen - centre) / scale) @ W.T + b
        loss, temperature = _calibrated(logits, truth)
        if best is None or loss < best[0]:
            best = loss, W / temperature, b / temperature
    assert best is not None  # at least one strength was tried
    W, b = best[1] / scale, best[2] - (best[1] / scale) @ centre
    readout = ClassReadout(torch.as_tensor(W), torch.as_tensor(b))
    right = readout.probabilities(seen).argmax(1) == truth
    return ClassFit(names, readout), float(right.mean())


def _regressions(x: Array, y: NDArray[np.int64]) -> Iterator[tuple[Array, Array]]:
    """Fit W (C, F) and b (C,) for each strength."""
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(max_iter=2000, warm_start=True)
    for strength in _STRENGTHS:
        model.set_params(C=strength).fit(x, y)
        W, b = np.asarray(model.coef_), np.asarray(model.intercept_)
        if len(b) == 1:  # for two classes: the log odds of the second
            W, b = np.concatenate([0 * W, W]), np.concatenate([0 * b, b])
        yield W, b


def _calibrated(logits: Array, truth: NDArray[np.int64]) -> tuple[float, float]:
    """Return the lowest mean log loss in nats, and its temperature."""

    def loss(log_t: float) -> float:
        scores = log_softmax(logits / np.exp(log_t), axis=1)
        return -float(scores[np.arange(len(truth)), truth].mean())

    found: Any = minimize_scalar(loss, bounds=_LOG_T, method="bounded")
    return float(found.fun), float(np.exp(found.x))
