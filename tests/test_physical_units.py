"""Units of measure: a model of m/s meets movement in m/s, or in what is certain to become it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilqr_clients.closed_loop import metres_per_second
from ilqr_clients.sdk import Model
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import (
    BehaviourSeries,
    Recording,
    RecordingSpec,
    SplitSpec,
    load_matching,
    write_nwb,
)
from ilqr_vae.recordings.joined import join
from ilqr_vae.recordings.physical_units import conversion, in_units

VELOCITY = np.random.default_rng(0).normal(size=(400, 2))


@pytest.mark.parametrize(
    ("given_", "wanted", "factor"),
    [
        ("cm/s", "m/s", 0.01),
        ("m/s", "cm/s", 100.0),
        ("m/s", "meters/second", 1.0),
        ("meters", "cm", 100.0),
        ("millimeters", "mm", 1.0),
        ("mm s^-1", "m s⁻¹", 1e-3),
        ("cm per second", "m·s-1", 0.01),
        ("mm / s", "m/s", 1e-3),
        ("m/s/s", "cm/s²", 100.0),
        ("deg/s", "rad/s", math.pi / 180),
        ("°", "rad", math.pi / 180),
        ("inches", "cm", 2.54),
        ("m/min", "m/s", 1 / 60),
        ("kg*m/s^2", "N", 1.0),
        ("µm", "um", 1.0),
        ("pixels", "px", 1.0),
        ("1/s", "Hz", 1.0),
        ("a.u.", "a.u.", 1.0),
    ],
)
def test_units_that_convert(given_: str, wanted: str, factor: float) -> None:
    found = conversion(given_, wanted)
    assert found == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ("m", "m/s"),
        ("cm/s", "cm/s^2"),
        ("px", "m"),
        ("a.u.", "m"),
        ("rad", "m"),
        ("m/s s", "m/s"),  # may mean m/(s s)
        ("M", "m"),
        ("V", "mm"),
        ("m/s-1", "m/s"),
        ("", "m"),
        ("1", "%"),
    ],
)
def test_units_that_do_not(given_: str, wanted: str) -> None:
    assert conversion(given_, wanted) is None


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_text_ends_in_anything_but_a_factor(a: str, b: str) -> None:
    factor = conversion(a, b)
    assert factor is None or factor > 0


def made(unit: str, scale: float = 1.0) -> Recording:
    return Recording(
        counts=np.ones((400, 2), dtype=np.uint16),
        bin_width=0.05,
        unit_names=("a", "b"),
        kinematics=scale * VELOCITY,
        kinematic_names=("vx", "vy"),
        kinematic_units=(unit, unit),
    )


def test_a_recording_is_converted_and_says_so() -> None:
    read = in_units(made("cm/s", 100.0), ("m/s", "m/s"), "the model")
    np.testing.assert_allclose(read.kinematics, VELOCITY, rtol=1e-12)
    assert read.kinematic_units == ("m/s", "m/s")
    assert next(str(w) for w in read.warnings) == (
        "Warning [units-converted]: vx converted from cm/s to m/s, the model's unit."
    )


def test_another_spelling_changes_no_bit_and_a_missing_unit_is_said() -> None:
    same = in_units(made("m/s"), ("meters/second", "m/s"), "the model")
    np.testing.assert_array_equal(same.kinematics, VELOCITY)
    assert not same.warnings
    silent = in_units(made("n/a"), ("m/s", "m/s"), "the model")
    np.testing.assert_array_equal(silent.kinematics, VELOCITY)
    assert silent.warnings[0].name == "units-unstated"
    assert "vx: the recording's unit is n/a, the model's is m/s" in silent.warnings[0].text


def test_a_unit_that_does_not_convert_is_refused_by_name() -> None:
    with pytest.raises(RecordingError, match=r"kinematic_units of vx: expected 'm/s'.*got 'px/s'"):
        in_units(made("px/s"), ("m/s", "m/s"), "the model")


def test_sessions_are_joined_in_the_first_ones_units() -> None:
    joined = join({"a": made("m/s"), "b": made("cm/s", 100.0)}, SplitSpec())
    alone = join({"a": made("m/s"), "b": made("m/s")}, SplitSpec())
    assert joined.kinematic_units == ("m/s", "m/s")
    np.testing.assert_allclose(joined.kinematics, alone.kinematics, rtol=1e-12)
    with pytest.raises(RecordingError, match="a's unit"):
        join({"a": made("m/s"), "b": made("m")}, SplitSpec())


def test_a_file_in_other_units_is_read_in_the_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    spikes = [np.sort(rng.uniform(0, 20, 300)) for _ in range(3)]

    def written(unit: str, scale: float) -> Path:
        series = BehaviourSeries(
            name="v", values=scale * VELOCITY, unit=unit, rate=20.0, channels=("vx", "vy")
        )
        return write_nwb(tmp_path / f"{scale:g}.nwb", spikes, series=(series,))

    def read(path: Path) -> Recording:
        model = Model(
            model_id="m",
            bin_width=0.05,
            unit_names=("unit0", "unit1", "unit2"),
            kinematic_names=("vx", "vy"),
            kinematic_units=("m/s", "m/s"),
        )
        return load_matching(path, RecordingSpec(bin_width=0.05), model)

    in_cm, in_m = read(written("cm/s", 100.0)), read(written("m/s", 1.0))
    np.testing.assert_allclose(in_cm.kinematics, in_m.kinematics, rtol=1e-9)
    with pytest.raises(RecordingError, match="'volt'"):
        read(written("volt", 3.0))


def test_a_closed_loop_moves_the_cursor_in_metres() -> None:
    assert metres_per_second(("cm/s", "mm/s", "px")) == [0.01, 1e-3]
    assert metres_per_second(("m", "px/s")) == [None, None]


def test_channels_have_unique_names() -> None:
    with pytest.raises(RecordingError, match="kinematic_names: expected 2 unique names"):
        replace(made("m/s"), kinematic_names=("v", "v"))
