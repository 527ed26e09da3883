"""Nothing looks across a break: crops, streams, the Wiener filter, slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ilqr_training.fit.build import build_model
from ilqr_training.fit.crops import Crops, Prepared, prepare
from ilqr_training.fit.loop import gradient_step, start
from ilqr_training.fit.validate import estimator_of
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import Recording, SplitSpec, Trials
from ilqr_vae.scoring.score import WIENER, score_decodes
from ilqr_vae.scoring.spacing import spaced_out
from tiny import config

LENGTHS = (20, 6, 30, 9, 25, 12, 18)


def pieces(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    velocity = rng.normal(size=(edges[-1], 2))
    return Recording(
        counts=rng.poisson(np.exp(velocity @ rng.normal(size=(2, 5)))).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple("abcde"),
        kinematics=velocity,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        breaks=edges[1:-1],
        bounds=(int(edges[-4]), int(edges[-3])),
        trials=Trials(
            edges[:-1],
            edges[1:],
            tuple("lrlrlrl"[: len(lengths)]),
            {"go": edges[:-1] + np.arange(len(lengths)) / 4},
        ),
    )


def prepared(recording: Recording, chunk: int = 15) -> Prepared:
    return prepare(recording, config().data, chunk=chunk)


def test_crops_stay_inside_their_segment() -> None:
    data = prepared(pieces())
    crops = Crops(data, build_model(config().model, data), 15, 0)
    index = crops.draw(400)
    live = crops.live(index)
    assert live is not None
    edges = [0, 20, 26, 56, 65]
    for row, mask in zip(index.tolist(), live.tolist(), strict=True):
        segment = np.searchsorted(edges, row[0], side="right")
        kept = [t for t, m in zip(row, mask, strict=True) if m]
        assert kept == row[: len(kept)]
        assert kept[-1] < edges[segment]
        assert len(kept) == 15 or kept[-1] == edges[segment] - 1
    assert set(index[:, 0].tolist()) == {*range(6), 20, *range(26, 42), 56}
    seen = crops.observed(index)["spikes"].mask
    assert torch.equal(seen[..., 0], live)


def test_a_short_segment_keeps_its_own_warm_start() -> None:
    data = prepared(pieces())
    model = build_model(config().model, data)
    crops = Crops(data, model, 15, 0)
    index = torch.as_tensor(20 + np.arange(15))[None]  # the segment of six bins
    z, u = torch.randn(1, 16, model.n), torch.randn(1, 15, model.m)
    crops.remember(index, z, u)
    assert torch.equal(crops.u[20:26], u[0, :6])
    assert not crops.u[26:].any()
    _, warm = crops.warm(index)
    assert torch.equal(warm[0, :6], u[0, :6])
    assert not warm[0, 6:].any()


def test_what_lies_beyond_a_short_trial_does_not_matter() -> None:
    """Another recording behind the break, the same gradient step."""
    one, other = pieces((6, 40, 20, 20)), pieces((6, 40, 20, 20), seed=1)
    counts, velocity = one.counts.copy(), one.kinematics
    assert velocity is not None
    velocity = velocity.copy()
    assert other.kinematics is not None
    counts[46:], velocity[46:] = other.counts[46:], other.kinematics[46:]
    bounds: list[float] = []
    for recording in (one, replace(one, counts=counts, kinematics=velocity)):
        data = replace(prepared(replace(recording, bounds=(46, 66))), kinematic_mean=np.zeros(2))
        data = replace(data, kinematic_scale=np.ones(2))
        torch.manual_seed(0)
        model = build_model(config().model, data)
        run = start(model, Crops(data, model, 15, 0), config().training)
        bounds.append(gradient_step(run, config().training).bound)
    assert bounds[0] == bounds[1]


def test_a_stream_begins_anew_at_every_break() -> None:
    recording, settings = pieces(), config()
    data = prepared(recording)
    estimator = estimator_of(build_model(settings.model, data), data, settings)
    whole = causal_pass(estimator, data.recording, 0, len(recording))
    parallel = causal_pass(estimator, data.recording, 0, len(recording), streams=4, run_in=30)
    for a, b in recording.segments():
        alone = causal_pass(estimator, data.recording.slice(a, b), 0, b - a)
        assert np.allclose(whole.window[a:b], alone.window, atol=1e-12)
        assert np.allclose(whole.covariance[a:b], alone.covariance, atol=1e-12)
    # pieces start inside segments and reach back at most 30 bins: the longest segment has 30
    assert np.allclose(parallel.window, whole.window, atol=1e-8)


def test_inputs_are_reported_once_later_bins_have_spoken() -> None:
    recording, settings = pieces((20, 3, 15, 12, 10)), config()
    data = prepared(recording, chunk=10)
    estimator = estimator_of(build_model(settings.model, data), data, settings)
    delay = settings.estimator.horizon - 1  # 3, below the usual delay
    inputs = causal_pass(estimator, data.recording, 0, len(recording)).inputs
    known = np.isfinite(inputs).all(axis=1)
    for a, b in recording.segments():
        assert known[a : b - delay].all()
        assert not known[max(a, b - delay) : b].any()
    state = estimator.init(1)
    for t in range(10):
        counts = torch.as_tensor(data.recording.counts[None, t].astype(np.float64))
        state, _ = estimator.step(state, counts, torch.ones_like(counts))
    assert np.allclose(inputs[9 - delay], state.u[0, 0].numpy())  # the window's oldest


def test_the_wiener_filter_sees_nothing_across_a_break() -> None:
    recording = replace(pieces((40, 30, 40, 25, 30, 20)), bounds=(110, 165))
    truth = recording.kinematics
    assert truth is not None
    swapped = np.concatenate([np.arange(40, 70), np.arange(40), np.arange(70, 185)])
    moved = replace(
        recording,
        counts=recording.counts[swapped],
        kinematics=truth[swapped],
        breaks=np.array([30, 70, 110, 135, 165]),
    )
    whole = [replace(r, breaks=np.array([165])) for r in (recording, moved)]
    decodes: list[np.ndarray] = []
    for made in (recording, moved, *whole):
        scores = score_decodes(made, SplitSpec(), bins=(165, 185), decoded=truth[165:])
        assert scores.wiener is not None
        assert WIENER in scores.methods
        decodes.append(scores.wiener)
    # the order of the trials tells it nothing, though it would if lags reached across (to within
    # what stands for bins never seen: the mean of the training part, or of both parts)
    apart, joined = (float(np.abs(decodes[i] - decodes[i + 1]).max()) for i in (0, 2))
    assert apart < 0.2 * joined


def test_segments_are_set_apart_by_bins_that_are_not_data() -> None:
    recording = pieces()
    spaced, place = spaced_out(recording, 10)
    assert np.array_equal(spaced.counts[place], recording.counts)
    assert not spaced.valid[np.setdiff1d(np.arange(len(spaced)), place)].any()
    assert (np.diff(place)[recording.breaks - 1] == 11).all()
    assert not len(spaced.breaks)


def test_slices_and_selections_keep_what_belongs_to_them() -> None:
    recording = replace(
        pieces(), held_out=("b", "e"), observed=np.ones((120, 5), dtype=bool), notes=("n",)
    )
    part = recording.slice(20, 60)
    assert part.breaks.tolist() == [6, 36]
    assert part.segments() == [(0, 6), (6, 36), (36, 40)]
    assert part.trials is not None
    assert part.trials.start.tolist() == [0, 6]
    assert part.trials.events["go"].tolist() == [0.25, 6.5]
    assert part.trials.condition == ("r", "l")
    assert part.bounds is None
    fewer = recording.select_units(("e", "a"))
    assert fewer.held_out == ("e",)
    assert fewer.observed is not None
    assert fewer.observed.shape == (120, 2)


@pytest.mark.parametrize("breaks", [[0], [5, 5], [120], [7, 3]])
def test_breaks_that_are_none_are_refused(breaks: list[int]) -> None:
    with pytest.raises(RecordingError, match=r"recording.breaks: expected increasing bins"):
        replace(pieces(), breaks=np.array(breaks))


def test_units_not_recorded_all_the_time_are_masked() -> None:
    recording = pieces()
    observed = np.ones((len(recording), 5), dtype=bool)
    observed[:40, 2] = False
    data = prepared(replace(recording, observed=observed))
    crops = Crops(data, build_model(config().model, data), 15, 0)
    seen = crops.observed(torch.arange(26, 41)[None])["spikes"].mask
    assert not seen[0, :14, 2].any()
    assert seen[0, 14, 2] == 1
    assert seen[0, :, [0, 1, 3, 4]].all()
    settings = config()
    estimator = estimator_of(build_model(settings.model, data), data, settings)
    rate = data.recording.counts[40:65, 2].mean()
    assert estimator.mean_rate[2].item() == pytest.approx(rate)
