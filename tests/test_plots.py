"""The public figures: whole, labelled with units, of arrays and of ``infer`` results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import robustness
from matplotlib.figure import Figure
from matplotlib.text import Text

from ilqr_vae import plots
from ilqr_vae.arrays import Inference
from ilqr_vae.errors import ShapeError
from ilqr_vae.scoring.score import OURS

T, N = 120, 7
rng = np.random.default_rng(0)
TRUTH = np.stack([np.sin(np.arange(T) / 9), np.cos(np.arange(T) / 7)], 1)
DECODED = TRUTH + 0.1 * rng.normal(size=TRUTH.shape)
STD = np.full(TRUTH.shape, 0.1)
COUNTS = rng.poisson(1.0, (T, N)).astype(np.float64)
LATENTS = rng.normal(size=(T, 4)).cumsum(axis=0)
AT = np.arange(20, 100, 10).astype(np.float64)
INFERRED = Inference(
    latents=LATENTS,
    covariance=np.broadcast_to(np.eye(4), (T, 4, 4)),
    inputs=rng.normal(size=(T, 3)),
    inputs_std=np.ones((T, 3)),
    rates=np.ones((T, N)),
    rates_std=np.ones((T, N)),
    kinematics=DECODED,
    kinematics_std=STD,
    initial=np.zeros(4),
    status="converged",
    counts=COUNTS,
    mask=np.ones((T, N)),
)
BIN: Any = {"bin_width": 0.05}
LONG = "the velocity of the hand along the long axis of the screen, low-pass filtered"
NAMED: Any = {"names": (LONG, "hand vy"), "units": ("m/s", "m/s")}

FIGURES: dict[str, Callable[[], Figure]] = {
    "agreement": lambda: plots.agreement(TRUTH[:, 0], DECODED[:, 0], name="vx", unit="m/s"),
    "averages": lambda: plots.averages([0.0, 0.1], [[1.0, 2.0]], [[1.0, 3.0]], conditions=["a"]),
    "bars": lambda: plots.bars({"silent": {"a": 0.1, "b": 0.2}}, xlabel="R² lost"),
    "calibration": lambda: plots.calibration(TRUTH, DECODED, STD),
    "decode": lambda: plots.decode(DECODED, STD, TRUTH, **BIN, **NAMED, others={LONG: TRUTH}),
    "input_size": lambda: plots.input_size([0.0, 0.1], [1.0, 2.0], [0.1, 0.1]),
    "inputs": lambda: plots.inputs(INFERRED, **BIN),
    "latency": lambda: plots.latency({"solve": [1.0, 2.0, np.nan]}, deadline_ms=50),
    "latent_plane": lambda: plots.latent_plane(INFERRED),
    "latents": lambda: plots.latents(LATENTS, **BIN),
    "learning": lambda: plots.learning([1, 2], [0.1, 0.2], name="bound (nats per bin)"),
    "paths": lambda: plots.paths([TRUTH[:10]], unit="m", targets=[[0.1, 0.0]], radius=0.02),
    "psth": lambda: plots.psth(INFERRED, AT, **BIN, conditions=["l", "r"] * 4),
    "raster": lambda: plots.raster(INFERRED, **BIN),
    "rates": lambda: plots.rates(INFERRED, **BIN),
    "reliability": lambda: plots.reliability([0.1, 0.9], [0.2, 0.8]),
    "residuals": lambda: plots.residuals([0.0, 1.0], STD[:2], STD[:2], **NAMED),
    "trials": lambda: plots.trials(
        {"a": [1.0, 200.0], "b": ["x", "y"], "c": [4, 8]},
        *([0.2, 0.1], [[(1, 0.2)], []]),
        logarithmic=["a"],
    ),
}


def test_every_public_figure_is_tried_here() -> None:
    assert plots.__all__ == list(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_and_nothing_is_cut_off(name: str) -> None:
    """Every visible word lies inside the figure, and the lowest axes name their quantity."""
    made = FIGURES[name]()
    made.draw_without_rendering()
    axes = [ax for ax in made.axes if ax.get_visible()]
    assert axes[-1].get_xlabel()
    assert all(ax.get_ylabel() or len(ax.get_yticklabels()) > 0 for ax in axes)
    ticks = [t.get_text() for ax in axes for t in ax.get_xticklabels() + ax.get_yticklabels()]
    assert not any("$" in text for text in ticks)  # a formula, which would stand there as it is
    inside = made.bbox.padded(1.0)
    words = [t for ax in axes for t in (ax.xaxis.label, ax.yaxis.label)]
    words += [t for ax in axes for t in ax.get_children() if isinstance(t, Text)]
    for shown in [*made.legends, *(t for t in words if t.get_text())]:
        box = shown.get_window_extent()
        assert inside.contains(*box.min), shown
        assert inside.contains(*box.max), shown


def test_axes_that_are_given_are_drawn_in() -> None:
    own = Figure()
    above, below = own.subplots(2, 1)
    assert plots.decode(INFERRED, **BIN, axes=[above, below]) is own
    assert plots.raster(COUNTS, **BIN, ax=above) is own
    assert len(above.images) == 1


def test_an_inference_and_its_arrays_give_the_same_lines() -> None:
    one = plots.latents(INFERRED, **BIN)
    other = plots.latents(LATENTS, np.ones((T, 4)), **BIN)
    lines = [[line.get_ydata() for line in f.axes[0].lines] for f in (one, other)]
    assert np.array_equal(lines[0], lines[1])
    assert len(one.axes[0].collections) == len(other.axes[0].collections) == 4


def test_a_psth_is_the_mean_of_the_counts() -> None:
    made = plots.psth(COUNTS, AT, bin_width=0.05, window=(0.0, 0.1))
    unit = int(made.axes[0].get_title(loc="left").split()[1])
    expected = [COUNTS[20 + k : 100 + k : 10, unit].mean() / 0.05 for k in range(3)]
    assert np.allclose(made.axes[0].lines[0].get_ydata(), expected)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plots.decode(DECODED, STD[:3], **BIN), "kinematics_std: expected shape"),
        (lambda: plots.decode(INFERRED.batch(), **BIN), r"decoded: expected one trial \(see"),
        (lambda: plots.decode(DECODED, names=["x"], **BIN), "names: expected 2, one a channel"),
        (lambda: plots.decode(DECODED, axes=[], **BIN), "axes: expected 2, one for each"),
        (lambda: plots.raster(np.zeros((2, 2, 2)), **BIN), r"counts: expected \(bins, channels\)"),
        (lambda: plots.calibration(TRUTH, DECODED), "std: expected standard deviations"),
        (lambda: plots.latency([np.nan]), "latency_ms: expected milliseconds"),
        (lambda: plots.psth(COUNTS, AT, **BIN, conditions=["l"]), "conditions: expected 8"),
    ],
)
def test_what_does_not_fit_is_refused(draw: Callable[[], Figure], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        draw()


def test_a_notebook_shows_a_figure() -> None:
    assert plots.raster(COUNTS, **BIN)._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]


def test_the_bars_of_robustness_are_those_of_the_page() -> None:
    """docs/robustness.png is drawn from the table of docs/decoding.md."""
    page = (Path(__file__).parent.parent / "docs" / "decoding.md").read_text()
    found = robustness.of_page(page)
    assert list(found) == ["25 % of units silent", "10 % of bins lost", "30 % of bins lost"]
    for losses in found.values():
        assert list(losses) == [OURS, robustness.UNTOLD, robustness.TOLD]
        assert all(f"{loss:g}" in page for loss in losses.values())
    rows = [
        {"condition": c, "decoder": d, "given": g, "loss": {"mean": m}}
        for c, d, g, m in (
            ("nothing wrong, units watched", OURS, "what it believes", 0.0),
            ("25 % of units silent, unannounced", OURS, "what it believes", 0.1),
            ("25 % of units silent, unannounced", "GRU", "zeros", 0.5),
            ("25 % of units silent, announced", OURS, "the mask", 0.09),
            ("25 % of units silent, announced", "GRU", "mean counts", 0.2),
        )
    ]
    told = {OURS: 0.1, robustness.UNTOLD: 0.5, robustness.TOLD: 0.2}
    assert robustness.of_result({"stress": rows}) == {"25 % of units silent": told}


def test_trials_highlight_the_chosen_one_at_the_values_that_were_tried() -> None:
    figure = plots.trials({"latents": [4, 8, 4]}, [0.2, 0.5, 0.1], [[(1, 0.2), (2, 0.2)]], best=0)
    curves, points = figure.axes
    assert list(points.get_xticks()) == [4, 8]
    colours: Any = points.collections[0].get_facecolor()
    assert (colours == colours[0]).all(1).tolist() == [True, False, False]
    assert all(float(t).is_integer() for t in curves.get_xticks())
