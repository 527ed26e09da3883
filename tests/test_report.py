"""Scores, the JSON form and the page, from made-up arrays."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.plots.style import GRID, INK, MUTED
from ilqr_vae.recordings import Recording, SplitSpec, Trials
from ilqr_vae.report import ReportData, distribution, render_html, to_json
from ilqr_vae.report.explorer import run_data
from ilqr_vae.scoring.metrics import r2_per_axis
from ilqr_vae.scoring.score import LEVELS, OURS, WIENER, calibration, score_decodes

T, N, TRIAL = 800, 20, 20


@pytest.fixture(scope="module")
def recording() -> Recording:
    rng = np.random.default_rng(0)
    angle = rng.integers(0, 8, T // TRIAL) * np.pi / 4
    speed = 16 * (np.linspace(0, 1, TRIAL) * (1 - np.linspace(0, 1, TRIAL))) ** 2 * 0.3
    velocity = np.concatenate([np.outer(speed, [np.cos(a), np.sin(a)]) for a in angle])
    log_rate = velocity @ rng.normal(size=(2, N)) * 4 - 0.3
    starts = np.arange(T // TRIAL) * TRIAL
    return Recording(
        counts=rng.poisson(np.exp(log_rate)).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple(f"u{i}" for i in range(N)),
        kinematics=velocity,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        trials=Trials(start=starts, stop=starts + TRIAL),
        name="made <up>.nwb",
    )


def report(recording: Recording, *, kinematics: bool = True) -> ReportData:
    rng = np.random.default_rng(1)
    a, b = SplitSpec().bins("test", T)
    part = recording.slice(a, b)
    assert recording.kinematics is not None
    error = 0.03 * rng.normal(size=(b - a, 2))
    decoded, std = recording.kinematics[a:b] + error, np.full((b - a, 2), 0.03)
    decoded[7] = np.nan
    total = rng.lognormal(1, 0.3, b - a)
    total[7] = np.nan
    latents = rng.normal(size=(b - a, 6)).cumsum(axis=0)
    latents[7] = np.nan
    data = ReportData(
        title=f"Replay of {recording.name}",
        kind="replay",
        bin_width=0.05,
        start=a * 0.05,
        counts=part.counts,
        status=tuple("" if i == 7 else "late" if i == 3 else "ok" for i in range(b - a)),
        latents=latents,
        latency_ms={"solve": total * 0.5, "total": total},
        deadline_ms=50.0,
        trials=part.trials,
        provenance={"command": "ilqr-vae replay 'made <up>.nwb'"},
    )
    if not kinematics:
        return data
    scores = score_decodes(recording, SplitSpec(), bins=(a, b), decoded=decoded, std=std)
    assert scores.wiener is not None
    return replace(
        data,
        names=("vx", "vy"),
        units=("m/s", "m/s"),
        truth=part.kinematics,
        decoded=decoded,
        decoded_std=std,
        baselines={WIENER: scores.wiener},
        scores=scores,
    )


def test_both_decoders_are_scored_on_the_same_answered_bins(recording: Recording) -> None:
    data = report(recording)
    assert data.scores is not None
    assert data.truth is not None
    assert data.decoded is not None
    n = len(data.counts)
    rows = np.arange(n) != 7
    assert data.scores.n == n - 1
    expected = r2_per_axis(data.truth[rows], data.decoded[rows])
    ours = data.scores.methods[OURS]
    assert ours["r2"] == pytest.approx(expected.mean())
    assert (ours["r2.vx"], ours["r2.vy"]) == pytest.approx(tuple(expected))
    wiener = r2_per_axis(data.truth[rows], data.baselines[WIENER][rows])
    assert data.scores.methods[WIENER]["r2"] == pytest.approx(wiener.mean())
    assert 0.5 < data.scores.methods[WIENER]["r2"] < ours["r2"]


def test_events_are_marked_on_the_time_line(recording: Recording) -> None:
    data = report(recording)
    middle = data.start + len(data.counts) * data.bin_width / 2
    data = replace(data, events=((middle, "reward <b>"), (-5.0, "before")))
    found = run_data(data)
    assert found is not None
    starts = [t for t, name in found["events"] if name == "trial start"]
    assert data.trials is not None
    assert len(starts) == len(data.trials)
    assert [round(middle, 4), "reward <b>"] in found["events"]
    assert "before" not in [name for _, name in found["events"]]
    page = render_html(data)
    assert "reward &lt;b&gt;" in page
    assert "<b>" not in page
    assert to_json(data)["events"][0] == {"seconds": middle, "name": "reward <b>"}


def test_calibration_of_a_gaussian_is_its_nominal_level() -> None:
    rng = np.random.default_rng(2)
    error = rng.normal(size=(20_000, 2)) * np.array([0.5, 3.0])
    std = np.broadcast_to(np.array([0.5, 3.0]), error.shape)
    actual = calibration(error, np.zeros_like(error), std)
    assert actual == pytest.approx(LEVELS, abs=0.01)


def test_a_wiener_filter_that_cannot_be_fitted_is_a_note(recording: Recording) -> None:
    short = SplitSpec(train=0.0)
    assert recording.kinematics is not None
    scores = score_decodes(recording, short, bins=(700, T), decoded=recording.kinematics[700:])
    assert scores.wiener is None
    assert WIENER not in scores.methods
    assert "No Wiener filter" in scores.notes[0]


def test_scoring_without_kinematics_or_with_a_wrong_shape_says_so(recording: Recording) -> None:
    bare = replace(recording, kinematics=None, kinematic_names=(), kinematic_units=())
    with pytest.raises(ShapeError, match=r"recording\.kinematics"):
        score_decodes(bare, SplitSpec(), bins=(0, 10), decoded=np.zeros((10, 2)))
    with pytest.raises(ShapeError, match="decoded: expected"):
        score_decodes(recording, SplitSpec(), bins=(0, 10), decoded=np.zeros((9, 2)))


def test_distribution_counts_only_what_is_known() -> None:
    values = np.append(np.arange(1.0, 101.0), np.nan)
    assert distribution(values)["n"] == 100
    assert distribution(values)["p50"] == pytest.approx(50.5)
    assert distribution(values)["max"] == 100.0
    assert distribution(np.array([np.nan]))["n"] == 0


def test_the_json_form_is_strict_json(recording: Recording) -> None:
    for data in (report(recording), report(recording, kinematics=False)):
        text = json.dumps(to_json(data), allow_nan=False)
        back = json.loads(text)
        assert back["bins"] == len(data.counts)
        assert back["statuses"]["ok"] == len(data.counts) - 2
        assert back["statuses"]["unanswered"] == 1
        assert back["bits_per_spike"] is None
        assert back["latency_ms"]["total"]["n"] == len(data.counts) - 1


class Page(HTMLParser):
    """Collects tags, references and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in {"href", "src", "xlink:href", "srcset", "action"}:
                self.references.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped(recording: Recording) -> None:
    page = Page()
    text = render_html(report(recording))
    page.feed(text)
    assert page.tags.count("script") == 2, "the data and the one that is hashed"
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000
    assert "link" not in page.tags
    assert {r[:11] for r in page.references if not r.startswith("#")} <= {"data:image/"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text.replace(script, ""))
    assert len(page.ids) == len(set(page.ids)), "ids of one picture must not meet another's"
    assert "Replay of made <up>.nwb" in page.text
    for title in (
        "Decoded movement",
        "Reaches",
        "Agreement",
        "Residuals",
        "Latent state",
        "Spikes",
    ):
        assert title in page.text
    assert not re.search(f'(fill|stroke)[:=]"? ?({INK}|{MUTED}|{GRID})', text), "ink of one theme"


def test_a_page_without_kinematics_leaves_their_pictures_out(recording: Recording) -> None:
    page = Page()
    page.feed(render_html(report(recording, kinematics=False)))
    assert "Reaches" not in page.text
    assert "Latent state" in page.text


def test_series_of_another_length_are_refused(recording: Recording) -> None:
    data = report(recording)
    with pytest.raises(ShapeError, match=r"report\.latents"):
        replace(data, latents=data.latents[:-1])
    with pytest.raises(ShapeError, match=r"report\.status"):
        replace(data, status=data.status[:-1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_whole(target, "old")
    write_whole(target, "new")
    assert target.read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError):
        write_whole(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "report.json"]


def test_an_output_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    check_writable(None, "--json")
    check_writable(tmp_path / "new.json", "--json")
    with pytest.raises(ConfigError, match="--json"):
        check_writable(tmp_path / "absent" / "new.json", "--json")
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(tmp_path, "--html")
