"""Discrete output: probabilities that mean what they say, and whose bits stand alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from ilqr_service.sessions.checks import check_open
from ilqr_training.fit.crops import Prepared
from ilqr_training.readout.causal import Causal
from ilqr_training.readout.classes import class_names, fit_classes
from ilqr_vae.artifact import load_artifact, save_artifact
from ilqr_vae.errors import ArtifactError, ProtocolError, RecordingError
from ilqr_vae.model.classes import ClassReadout
from ilqr_vae.protocol.answer import class_of
from ilqr_vae.recordings import Recording, Trials
from ilqr_vae.scoring.classes import score_classes
from rig import make_model
from test_sessions import INFO, open_

LENGTH, LATENTS = 10, 3


def data(conditions: list[str], train: float = 0.5) -> Prepared:
    """Trials of ten bins, two bins apart."""
    start = np.arange(len(conditions)) * (LENGTH + 2)
    n_bins = len(conditions) * (LENGTH + 2)
    trials = Trials(start, start + LENGTH, tuple(conditions))
    counts = np.ones((n_bins, 1), dtype=np.uint16)
    split = round(train * n_bins)
    none = np.zeros(0)
    recording = Recording(counts=counts, bin_width=0.05, unit_names=("u",), trials=trials)
    return Prepared(recording, (0, split), (split, n_bins), (n_bins, n_bins), none, none)


def causal(window: NDArray[np.float64]) -> Causal:
    none = np.zeros((len(window), 0))
    empty = np.zeros(len(window))
    return Causal(window, none, none, none, none, none, none, empty, empty, {}, 1.0)


@pytest.mark.parametrize("kinds", [2, 3])
def test_probabilities_are_calibrated_though_the_training_part_flatters(kinds: int) -> None:
    # latents tell the class by less in the held-out part than in the training part
    rng = np.random.default_rng(kinds)
    of = rng.integers(0, kinds, 600)
    made = data([f"{10 * k}" for k in of])
    names = class_names(made)
    assert names == tuple(f"{10 * k}" for k in range(kinds))
    labels = made.recording.labels(names)
    assert (labels.reshape(600, -1)[:, :LENGTH] == of[:, None]).all()
    assert (labels.reshape(600, -1)[:, LENGTH:] == -1).all()
    means = rng.normal(size=(kinds, LATENTS)) * 2
    noise = np.where(np.arange(len(labels)) < made.train[1], 0.7, 2.0)[:, None]
    window = means[labels] + noise * rng.normal(size=(len(labels), LATENTS))
    train, held = (causal(window[slice(*span)]) for span in (made.train, made.validation))
    fit, accuracy = fit_classes(train, held, made, LATENTS)
    fresh = means[labels] + 2.0 * rng.normal(size=(len(labels), LATENTS))
    scores = score_classes(fit.readout.probabilities(fresh), labels, names)
    assert scores is not None
    assert scores.calibration_error < 0.03
    assert abs(scores.accuracy - accuracy) < 0.05
    assert scores.accuracy > scores.chance + 0.1
    # who abstains is right more often
    assert scores.answered[0] == 1.0
    assert all(a >= b for a, b in zip(scores.answered, scores.answered[1:], strict=False))
    assert scores.right[-1] > scores.right[0]


def test_a_row_has_the_same_bits_in_any_company_and_none_where_nothing_is_known() -> None:
    rng = np.random.default_rng(0)
    weights = (torch.as_tensor(rng.normal(size=shape)) for shape in ((5, 200), (5,)))
    readout = ClassReadout(*weights)
    window = rng.normal(size=(33, 260))
    together = readout.probabilities(window)
    np.testing.assert_allclose(together.sum(1), 1.0)
    for k, row in enumerate(window):
        assert np.array_equal(readout.probabilities(row[None]), together[k : k + 1])
    window[3, 7], window[4, 8] = np.nan, np.inf
    gone = readout.probabilities(window)
    assert np.isnan(gone[3:5]).all()
    assert np.array_equal(gone[5:], together[5:])
    names = ("a", "b", "c", "d", "e")
    best = int(together[0].argmax())
    assert class_of(together[0], names, 0.0) == names[best]
    assert class_of(together[0], names, together[0, best]) == names[best]
    assert class_of(together[0], names, np.nextafter(together[0, best], 2)) == ""
    assert class_of(gone[3], names, 0.0) == ""


@pytest.mark.parametrize(
    ("conditions", "got"),
    [
        (["a"] * 20, "1: a"),
        ([""] * 20, "none"),
        ([str(k) for k in range(300)], "150: 0, 1, 2, 3, ..."),
        (["a", "b"] * 5 + ["c"] * 10, "none"),
    ],
    ids=["one", "unknown", "a class a trial", "others in the validation part"],
)
def test_classes_that_cannot_be_fitted_are_refused(conditions: list[str], got: str) -> None:
    with pytest.raises(RecordingError, match=r"readout\.classes") as error:
        class_names(data(conditions))
    assert got in error.value.got


def test_a_model_file_has_classes_or_is_as_it_was(tmp_path: Path) -> None:
    plain = load_artifact(make_model(tmp_path / "plain", n_units=5))
    assert plain.classes is None
    assert (plain.manifest.schema, plain.manifest.classes or ()) == (3, ())
    path = make_model(tmp_path / "m", n_units=5, classes=("left", "right"))
    a = load_artifact(path)
    assert a.classes is not None
    assert (a.manifest.schema, a.manifest.classes) == (5, ("left", "right"))
    assert a.manifest.model_id != plain.manifest.model_id
    given = (a.model, a.readout, a.mean_rate)
    for names, classes in (
        (("left",), a.classes),
        (("left", "right"), None),
        (("left", "right"), a.classes._replace(W=a.classes.W[:, :3])),
    ):
        manifest = replace(a.manifest, classes=names)
        save_artifact(tmp_path / "bad", manifest, *given, classes=classes)
        with pytest.raises(ArtifactError, match="classes"):
            load_artifact(tmp_path / "bad")


@pytest.mark.parametrize("abstain", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(abstain: float) -> None:
    with pytest.raises(ProtocolError, match="abstain: expected 0 to 1"):
        check_open(open_(abstain=abstain), INFO)


def test_abstaining_needs_a_model_with_classes() -> None:
    with pytest.raises(ProtocolError, match="the model has no classes"):
        check_open(open_(abstain=0.5), INFO)
