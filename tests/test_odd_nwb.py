"""NWB files that hypothesis makes: each is read, or refused by an error with a field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import ClockSpec, NwbSpec, RecordingSpec, TrialSpec, load_recording
from odd_files import FEW, SPIKES, START, TIME, Damage, damages, file, moved, saved, spoilt, trials

SPECS = (
    RecordingSpec(),
    RecordingSpec(
        mode="trials",
        units={"quality": "good"},
        nwb=NwbSpec(scored="mask", stamps="end"),
        trials=TrialSpec(event="go_time", window=(-0.2, 0.5)),
    ),
    RecordingSpec(
        bin_width=0.1,
        differentiate=True,
        nwb=NwbSpec(counts="counts", rate=99.0, kinematics="hand_vel"),
        clocks=ClockSpec(kinematics=(0.5, 1.0)),
    ),
    RecordingSpec(units={"location": "M1"}, trials=TrialSpec(relative_spikes=True)),
)


def rich(tmp_path: Path) -> Path:
    """A file with everything that a reader looks at."""
    nwb = pynwb.NWBFile("made up", "id", START_TIME)
    group = nwb.create_electrode_group("g", "d", "M1", nwb.create_device("d"))
    for _ in SPIKES:
        nwb.add_electrode(group=group, location="M1")
    for name in ("quality", "unit_name", "heldout"):
        nwb.add_unit_column(name, "made up")
    for i, times in enumerate(SPIKES):
        nwb.add_unit(
            spike_times=times,
            obs_intervals=[[0.0, 60.0]],
            electrodes=[i],
            electrode_group=group,
            quality="good" if i else "mua",
            unit_name=str(i),
            heldout=False,
        )
    moved(trials(nwb, START, START + 4, go_time=START + 1), timestamps=TIME)
    moved(nwb, "mask", np.ones(len(TIME)))
    moved(nwb, "counts", np.ones((600, len(SPIKES))), rate=10.0)
    nwb.add_invalid_time_interval(start_time=3.0, stop_time=4.0)
    return saved(tmp_path, nwb)


START_TIME = file().session_start_time
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.tuples(SHAPES, st.sampled_from(["f8", "i2", "u1", "?", "c16", "f2", "S3", "V2"])).map(
        lambda made: np.ones(made[0], dtype=made[1])
    ),
    st.tuples(st.sampled_from([6, 12, 6000]), st.floats(width=32)).map(
        lambda made: np.full(made[0], made[1])
    ),
    st.tuples(st.sampled_from([6, 12, 6000]), st.integers(-(2**62), 2**62)).map(
        lambda made: np.arange(made[0]) + made[1]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5),
    st.just(h5py.Empty("f8")),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    path = rich(tmp_path_factory.mktemp("rich"))
    found: list[str] = []
    with h5py.File(path, "r") as raw:
        raw.visit(found.append)
    return path.read_bytes(), [p for p in found if not p.startswith("specifications")]


def read_or_named(path: Path, spec: RecordingSpec) -> None:
    try:
        said = [str(len(load_recording(path, spec)))]
    except RecordingError as error:
        said = [error.field, error.got, str(error)]
    assert all(len(each.splitlines()) == 1 for each in said)


def test_any_dataset_attribute_or_link_is_read_or_named(
    tmp_path: Path, places: tuple[bytes, list[str]]
) -> None:
    whole, names = places
    path = tmp_path / "a.nwb"
    kinds = st.sampled_from(["replace", "delete", "link", "group", "attribute", "unattribute"])
    change = st.tuples(kinds, st.sampled_from(names), VALUES, st.data())

    @FEW
    @given(st.lists(change, min_size=1, max_size=2), st.sampled_from(SPECS))
    def changed(changes: list[tuple[str, str, Any, st.DataObject]], spec: RecordingSpec) -> None:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as raw:
            for kind, place, values, data in changes:
                if raw.get(place) is None:
                    continue
                attributes = sorted(raw[place].attrs)
                if kind.endswith("attribute"):
                    if attributes:
                        name = data.draw(st.sampled_from(attributes))
                        del raw[place].attrs[name]
                        if kind == "attribute":
                            raw[place].attrs[name] = values
                    continue
                kept = dict(raw[place].attrs)
                del raw[place]
                if kind == "replace":
                    raw[place] = values
                    raw[place].attrs.update(kept)
                elif kind == "group":
                    raw.create_group(place).attrs.update(kept)
                elif kind == "link":
                    raw[place] = h5py.SoftLink("/nowhere")
        read_or_named(path, spec)

    changed()


def test_any_bytes_are_read_or_named(tmp_path: Path, places: tuple[bytes, list[str]]) -> None:
    whole, path = places[0], tmp_path / "a.nwb"

    @FEW
    @given(damages(len(whole)), st.sampled_from(SPECS))
    def damaged(damage: Damage, spec: RecordingSpec) -> None:
        path.write_bytes(spoilt(whole, damage))
        read_or_named(path, spec)

    damaged()
