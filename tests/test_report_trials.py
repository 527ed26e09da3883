"""What a report says of trials and of time: bootstrap, PSTHs, inputs around events, residuals."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.recordings import Recording, SplitSpec, Trials
from ilqr_vae.report import Reaches, ReportData, add_cursor, figures, render_html, to_json
from ilqr_vae.report.analyses import MOVEMENT, TARGET, onsets, psths, residuals, triggered_inputs
from ilqr_vae.report.outputs import picture_of
from ilqr_vae.scoring.bootstrap import interval, pieces, r2_draws
from ilqr_vae.scoring.score import OURS, WIENER, coverage_by_speed, score_decodes

TRIAL, K, N = 30, 40, 6


@cache
def reaching(*, trials: bool = True, events: bool = True) -> tuple[ReportData, Recording]:
    """Trials of 1.5 s that move from 0.6 s on; two conditions; inputs that jump as they move."""
    rng = np.random.default_rng(0)
    T = TRIAL * K
    start = np.arange(K) * TRIAL
    side = np.arange(K) % 2
    phase = ((np.arange(TRIAL) - 12) / 10).clip(0, 1)
    speed = (phase * (1 - phase)) ** 2 * 4
    velocity = np.zeros((T, 2))
    for a, s in zip(start, side, strict=True):
        velocity[a : a + TRIAL, 0] = speed * (1 if s else -1)
        velocity[a : a + TRIAL, 1] = 0.5 * speed
    rates = np.exp(velocity @ rng.normal(size=(2, N)) * 6 + 0.3)
    inputs = rng.normal(size=(T, 3)) * 0.1
    inputs[(np.arange(T) % TRIAL) == 12] += 2.0
    inputs[-5:] = np.nan
    when = {
        "target_on_time": start + 4.0,
        "move_onset_time": np.where(np.arange(K) == 3, np.nan, start + 12.25),
    }
    made = Trials(start, start + TRIAL, tuple("lr"[s] for s in side), when if events else {})
    recording = Recording(
        counts=rng.poisson(rates).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple("abcdef"),
        kinematics=velocity,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        trials=made if trials else None,
    )
    std = np.full((T, 2), 0.03)
    decoded = velocity + 0.03 * rng.normal(size=(T, 2))
    worse = velocity + 0.08 * rng.normal(size=(T, 2))
    scores = score_decodes(
        recording,
        SplitSpec(),
        bins=(0, T),
        decoded=decoded,
        std=std,
        others={"GRU": worse},
        others_std={"GRU": np.full((T, 2), 0.08)},
    )
    data = ReportData(
        title="made up",
        kind="evaluate",
        bin_width=0.05,
        start=0.0,
        counts=recording.counts,
        status=("ok",) * T,
        latents=velocity @ rng.normal(size=(2, 4)),
        names=("vx", "vy"),
        units=("m/s", "m/s"),
        truth=velocity,
        decoded=decoded,
        decoded_std=std,
        trials=recording.trials,
        scores=scores,
        rates=rates,
        inputs=inputs,
        learning={"bound": ((1, -3.0), (2, -2.5)), "causal R2": ((2, 0.4),)},
    )
    return data, recording


def test_the_interval_covers_what_it_should() -> None:
    """Errors alike within a trial: the bootstrap over trials covers the long-run R2, most times."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = np.repeat(rng.normal(size=(50, 1)), 10, axis=0) + 0.1 * rng.normal(size=(500, 1))
        error = np.repeat(rng.normal(size=(50, 1)), 10, axis=0) * 0.5
        draws = r2_draws(truth, truth + error, np.repeat(np.arange(50), 10), 50)
        found = interval(draws)
        assert found is not None
        hits += found[0] < 1 - 0.25 / 1.01 < found[1]
    assert hits >= 50  # of 60; 95 % is 57, and resampling few pieces is known to be optimistic


def test_pieces_are_trials_or_blocks() -> None:
    data, recording = reaching()
    everything = np.ones(len(recording), dtype=bool)
    assert pieces(everything, 0.05, data.trials).what == "trials"
    blocks = pieces(everything, 0.05, None)
    assert (blocks.what, blocks.number) == ("blocks of 5 s", 12)
    assert np.bincount(blocks.of).tolist() == [100] * 12
    few = Trials(np.array([0]), np.array([1200]))
    assert pieces(everything, 0.05, few).what == "blocks of 5 s"


def test_the_interval_is_of_all_scored_bins_those_between_trials_too() -> None:
    """Decoded well between trials and badly within: R2 is of both, and so is its interval."""
    _, recording = reaching()
    start = np.arange(K) * TRIAL + 8
    trials = Trials(start, start + 18)
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(len(recording), 2))
    within = (np.arange(len(truth)) % TRIAL - 8) % TRIAL < 18
    noise = rng.normal(size=truth.shape)
    cut = replace(recording, kinematics=truth, trials=trials)
    made = score_decodes(
        cut,
        SplitSpec(),
        bins=(0, len(truth)),
        decoded=truth + noise * np.where(within, 0.7, 0.1)[:, None],
        others={"worse": truth + noise * np.where(within, 0.9, 0.1)[:, None]},
        baseline=False,
    )
    for name, values in made.methods.items():
        low, high = made.intervals[name]["r2"]
        assert low < values["r2"] < high
    low, high = made.intervals["worse"]["ahead"]
    assert low < made.methods[OURS]["r2"] - made.methods["worse"]["r2"] < high
    assert made.resampled == "40 trials, each with the time up to the next"
    scored = np.ones(len(truth), dtype=bool)
    scored[40:50] = False
    drawn = pieces(scored, 0.05, trials)
    assert np.bincount(drawn.of).tolist() == [38, 20, *[30] * 37, 22]  # each scored bin in one
    alone = pieces(within, 0.05, trials)
    assert (alone.what, alone.number) == ("trials", K)
    scored[12 * TRIAL :] = False
    assert pieces(scored, 0.05, trials).number == 12  # those of the others have no bin


def test_every_method_handed_in_is_in_the_table_with_its_interval() -> None:
    data, _ = reaching()
    scores = data.scores
    assert scores is not None
    assert list(scores.methods) == [OURS, WIENER, "GRU"]
    assert scores.resampled == "40 trials"
    for name, values in scores.methods.items():
        low, high = scores.intervals[name]["r2"]
        assert low < values["r2"] < high
    assert scores.intervals["GRU"]["ahead"][0] > 0
    assert "ahead" not in scores.intervals[OURS]
    assert scores.methods["GRU"]["coverage_90"] == pytest.approx(0.9, abs=0.03)
    text = render_html(data)
    low, high = scores.intervals["GRU"]["r2"]
    assert f"{low:.3f} to {high:.3f}" in text
    assert "bootstrap over 40 trials" in text


def test_a_method_that_does_not_fit_is_refused() -> None:
    _, recording = reaching()
    truth = recording.kinematics
    assert truth is not None
    with pytest.raises(ShapeError, match=r"others.GRU: expected finite"):
        score_decodes(
            recording, SplitSpec(), bins=(0, 1200), decoded=truth, others={"GRU": truth[1:]}
        )


def test_onsets_come_from_the_file_or_from_the_speed() -> None:
    data, _ = reaching()
    found = onsets(data)
    assert set(found) == {TARGET, MOVEMENT}
    assert np.isnan(found[MOVEMENT][3])
    bare, _ = reaching(events=False)
    found = onsets(bare)
    assert set(found) == {"trial start", MOVEMENT}
    assert (np.abs(found[MOVEMENT] - np.arange(K) * TRIAL - 14) <= 1).all()
    assert onsets(reaching(trials=False)[0]) == {}


@pytest.mark.parametrize(
    ("names", "target", "movement"),
    [
        (("category_time", "target_position_time", "removed_time"), None, None),
        (("category_time", "go_time"), "go_time", None),
        (("gone_time", "targetOnTime", "moveOnset_time"), "targetOnTime", "moveOnset_time"),
        (("go_cue_time", "target_onset_time", "movement_on"), "target_onset_time", "movement_on"),
    ],
)
def test_events_are_known_by_whole_words(
    names: tuple[str, ...], target: str | None, movement: str | None
) -> None:
    bare, _ = reaching(events=False)
    start = np.arange(K) * TRIAL
    events = {name: start + 2.0 + i for i, name in enumerate(names)}
    found = onsets(replace(bare, trials=Trials(start, start + TRIAL, (), events)))
    assert (TARGET in found) == (target is not None)
    if target is not None:
        assert np.array_equal(found[TARGET], events[target])
    if movement is not None:
        assert np.array_equal(found[MOVEMENT], events[movement])
    else:
        assert not any(np.array_equal(found[MOVEMENT], at) for at in events.values())


def test_a_movement_begins_after_the_go() -> None:
    """The hand still moves as trials begin; in one it moves as the go comes."""
    bare, _ = reaching(events=False)
    assert bare.truth is not None
    start = np.arange(K) * TRIAL
    before = bare.truth.copy()
    before[(np.arange(len(before)) % TRIAL) < 4] = (0.3, 0.0)  # faster than the reach
    before[5 * TRIAL + 9] = (0.2, 0.0)
    go = start + 9.4
    go[7] = np.nan  # the target's is taken
    made = Trials(start, start + TRIAL, (), {"target_on_time": start + 5.0, "go_cue_time": go})
    returning = replace(bare, truth=before, trials=made)
    moved = onsets(returning)[MOVEMENT]
    assert np.flatnonzero(np.isnan(moved)).tolist() == [5]
    assert (np.abs(np.delete(moved - start, 5) - 14) <= 1).all()
    shown = {one.event: one for one in triggered_inputs(returning)}[MOVEMENT]
    assert (shown.trials, shown.time[0]) == (K - 1, pytest.approx(-8 * 0.05 + 0.025))
    averaged = psths(returning)
    assert averaged is not None
    assert sum(averaged.trials) == K - 1
    unmarked = replace(returning, trials=replace(made, events={}))
    assert MOVEMENT not in onsets(unmarked)  # all move as the trial begins
    found = psths(unmarked)
    assert found is not None
    assert found.event == "trial start"


def test_inputs_peak_where_they_jump() -> None:
    data, _ = reaching()
    by_event = {one.event: one for one in triggered_inputs(data)}
    moving = by_event[MOVEMENT]
    assert moving.trials == K - 1
    assert moving.time[np.argmax(moving.mean)] == pytest.approx(0.025)
    assert moving.mean.max() > 10 * np.median(moving.mean)
    target = by_event[TARGET]
    assert target.time[np.argmax(target.mean)] == pytest.approx(8 * 0.05 + 0.025)
    assert target.time[0] == pytest.approx(-4 * 0.05 + 0.025)  # not before the trial


def test_psths_average_what_was_counted_and_modelled() -> None:
    data, recording = reaching()
    found = psths(data)
    assert found is not None
    assert found.conditions in (("l", "r"), ("r", "l"))
    assert found.correlation > 0.8
    unit, place = found.units[0], list(found.conditions).index("r")
    rows = [k for k in range(K) if data.trials.condition[k] == "r" and k != 3]
    at = int(np.argmin(np.abs(found.time - 0.025)))
    mean = np.mean([recording.counts[k * TRIAL + 12, unit] for k in rows]) / 0.05
    assert found.counted[place, at, 0] == pytest.approx(mean)
    assert data.trials is not None
    unnamed = psths(replace(data, trials=replace(data.trials, condition=())))
    assert unnamed is not None
    assert set(unnamed.conditions) == {"45°", "135°"}  # 27° and 153°
    assert psths(replace(data, rates=None)) is None
    assert psths(reaching(trials=False)[0]) is None


def test_units_shown_are_those_that_tell_conditions_apart() -> None:
    """One follows time alone, widely; another the condition alone, a little."""
    data, _ = reaching()
    assert data.rates is not None
    phase = np.arange(len(data.rates)) % TRIAL
    side = np.repeat(np.arange(K) % 2, TRIAL)
    rates = np.ones_like(data.rates)
    rates[:, 2] += 0.2 * side
    rates[:, 4] += np.sin(phase)
    found = psths(replace(data, rates=rates), shown=1)
    assert found is not None
    assert found.units == (2,)
    assert data.trials is not None
    same = replace(data.trials, condition=("all",) * K)
    alone = psths(replace(data, rates=rates, trials=same), shown=1)
    assert alone is not None
    assert alone.units == (4,)


def test_residuals_follow_a_decoder_that_goes_stale() -> None:
    data, _ = reaching()
    assert data.decoded is not None
    stale = data.decoded.copy()
    stale[600:] += np.random.default_rng(1).normal(size=(600, 2)) * 0.3
    found = residuals(replace(data, decoded=stale))
    assert found is not None
    assert found.rms.shape == (40, 2)
    assert (found.rms[25:] > 3 * found.rms[:15].max()).all()
    assert np.allclose(found.stated, 0.03)


def test_the_json_form_holds_what_the_page_shows() -> None:
    data, _ = reaching()
    back = json.loads(json.dumps(to_json(data), allow_nan=False))
    assert back["intervals_95"]["GRU"]["r2"][0] < back["scores"]["GRU"]["r2"]
    assert back["resampled"] == "40 trials"
    assert {one["event"] for one in back["inputs"]} == {TARGET, MOVEMENT}
    assert len(back["residuals"]["rms"]) == 40
    assert sorted(back["psth"]["trials"]) == [19, 20]  # one has no onset
    assert back["learning"]["bound"] == [[1, -3.0], [2, -2.5]]
    text = render_html(data)
    for title in ("Residuals over time", "Firing around", "Inferred inputs", "Learning curves"):
        assert title in text


def test_without_trials_blocks_and_directions_remain() -> None:
    data, _ = reaching(trials=False)
    assert data.scores is not None
    assert data.scores.resampled == "12 blocks of 5 s"
    text = render_html(data)
    assert "Inferred inputs" not in text
    assert "Colour is the direction of the movement" in text


def test_a_direction_has_one_colour_and_named_conditions_take_it() -> None:
    """Left-going trials named "l" are drawn in the colour of their direction."""
    data, _ = reaching()
    found = psths(data)
    assert found is not None
    angle = dict(zip(found.conditions, found.directions, strict=True))
    assert angle["r"] == pytest.approx(np.arctan2(0.5, 1))
    assert angle["l"] == pytest.approx(np.arctan2(0.5, -1))
    mixed = replace(data.trials, condition=("both",) * K) if data.trials else None
    both = psths(replace(data, trials=mixed))
    assert both is not None
    assert np.isnan(both.directions).all()  # the two ways cancel
    drawn, paths = figures.psth(data), figures.reaches(data)
    assert drawn
    assert paths
    assert next(c for c, name in drawn.key if name[0] == "l") in paths.panels[0]


def test_the_section_of_a_closed_loop_goes_into_a_report(tmp_path: Path) -> None:
    data, _ = reaching()
    page = tmp_path / "report.html"
    page.write_text(render_html(data))
    path = np.linspace(0, 1, 9)[:, None] * np.array([0.1, 0.0])
    cursor = {"decoder": Reaches((path, -path), np.array([[0.1, 0], [-0.1, 0]]), (True, False))}
    add_cursor(page, cursor, 0.02)
    text = page.read_text()
    assert "decoder: 1 of 2 succeed" in text
    assert text.index("Residuals over") < text.index("paths of the cursor") < text.index("Scores")
    with pytest.raises(ConfigError, match="without a section of a closed loop"):
        add_cursor(page, cursor, 0.02)
    assert (picture_of(data) or b"").startswith(b"\x89PNG")
    page.write_text("<html>no report</html>")
    with pytest.raises(ConfigError, match="a page that replay or evaluate wrote"):
        add_cursor(page, cursor, 0.02)
    assert "decoder: 1 of 2 succeed" in render_html(replace(data, cursor=cursor, radius=0.02))


def test_inputs_share_a_scale_that_holds_all_of_them() -> None:
    data = reaching()[0]
    drawn = figures.inputs_around(data)
    assert drawn
    greatest = max(float((one.mean + one.error).max()) for one in triggered_inputs(data))
    for panel in drawn.panels:
        ticks = [float(t) for t in re.findall(r">([\d.]+)</text>", panel) if "." in t]
        assert max(ticks) <= 1.1 * greatest
        assert greatest < max(ticks) * 1.5


def test_quarters_that_end_at_one_speed_are_one_row() -> None:
    """The hand rests in 70 % of the bins."""
    truth = np.zeros((100, 1))
    truth[70:] = np.linspace(0.1, 1, 30)[:, None]
    found = coverage_by_speed(truth, truth, np.ones_like(truth), ("m/s",))
    assert list(found.upto) == sorted(set(found.upto))
    assert found.upto[0] == 0.0
    assert found.coverage == (1.0,) * len(found.upto)
    data, _ = reaching()
    assert data.scores is not None
    text = render_html(replace(data, scores=replace(data.scores, by_speed=found)))
    assert ">0<" in text
    assert ">0 to 0<" not in text


def test_the_run_can_be_read_back_from_the_page() -> None:
    data, _ = reaching()
    text = render_html(data)
    run = json.loads(re.findall(r'id="run-data">(.*?)</script>', text)[0])
    assert (run["bins"], run["of"], run["step"]) == (TRIAL * K, TRIAL * K, 0.05)
    line = run["charts"][0]["lines"][-1]
    steps = np.frombuffer(base64.b64decode(line["b64"]), dtype="<i2").astype(float)
    assert data.decoded is not None
    back = line["low"] + (steps + 32767) * line["step"]
    assert np.allclose(back, data.decoded[:, 0], atol=line["step"])
