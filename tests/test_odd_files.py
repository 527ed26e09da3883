"""Odd files: whatever one holds, reading it ends in a recording or in an error with a field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import io, sparse

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import Hdf5Spec, MatSpec, Recording, RecordingSpec, load_recording
from odd_files import FEW, Damage, damages, spoilt

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(2.0, (3, 40))
HAND = RNG.normal(size=(2, 40))
TIMES = [np.sort(RNG.uniform(0, 2, 30)) for _ in range(3)]
BINNED = MatSpec(spikes="spikes", kinematics="hand")
TIMED = MatSpec(spike_times="spikes", time="t", kinematics="hand")
T = np.arange(40) * 0.05


def v73(path: Path, write: Callable[[h5py.File], None]) -> Path:
    """A MAT file of version 7.3 as MATLAB lays it out."""
    with h5py.File(path, "w", userblock_size=512) as file:
        write(file)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path


def cells(file: h5py.File, name: str, values: list[Any]) -> h5py.Dataset:
    made = file.create_dataset(name, (len(values), 1), dtype=h5py.ref_dtype)
    for i, value in enumerate(values):
        if value is not None:
            made[i, 0] = file.create_dataset(f"#refs#/{name.replace('/', '_')}{i}", data=value).ref
    return made


def read(path: Path, mat: MatSpec) -> Recording:
    return load_recording(path, RecordingSpec(bin_width=0.05, mat=mat))


def in_structs(mat: MatSpec) -> MatSpec:
    return MatSpec(
        spikes="session.data.spikes" if not mat.spike_times else "spikes",
        spike_times="session.data.spikes" if mat.spike_times else "",
        time="session.t" if mat.time else "",
        kinematics="session.hand",
    )


# ---- into structs ------------------------------------------------------------------------------


def test_dotted_names_lead_into_structs_of_both_versions(tmp_path: Path) -> None:
    io.savemat(tmp_path / "a.mat", {"session": {"data": {"spikes": COUNTS}, "hand": HAND}})

    def write(file: h5py.File) -> None:
        file["session/data/spikes"], file["session/hand"] = COUNTS.T, HAND.T

    io.savemat(tmp_path / "flat.mat", {"spikes": COUNTS, "hand": HAND})
    flat = read(tmp_path / "flat.mat", BINNED)
    for path in (tmp_path / "a.mat", v73(tmp_path / "b.mat", write)):
        made = read(path, in_structs(BINNED))
        np.testing.assert_array_equal(made.counts, flat.counts)
        np.testing.assert_array_equal(made.kinematics, flat.kinematics)


def test_a_field_of_a_struct_array_is_as_a_cell_array(tmp_path: Path) -> None:
    """units(1).times, units(2).times, ...: how spike sorters write them."""
    units = np.array([(t,) for t in TIMES], dtype=[("times", "O")])
    io.savemat(tmp_path / "a.mat", {"units": units, "t": T, "hand": HAND})

    def write(file: h5py.File) -> None:
        cells(file, "units/times", [t[None] for t in TIMES])
        file["t"], file["hand"] = T[:, None], HAND.T

    mat = MatSpec(spike_times="units.times", time="t", kinematics="hand")
    a, b = read(tmp_path / "a.mat", mat), read(v73(tmp_path / "b.mat", write), mat)
    assert a.n_units == 3
    assert a.counts.sum() == sum(len(t) for t in TIMES)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_what_is_in_a_struct_is_listed(tmp_path: Path) -> None:
    io.savemat(tmp_path / "a.mat", {"session": {"spike": COUNTS, "hand": HAND}, "spikes": "words"})
    for name, message in (
        ("session.spikes", r"data.mat.spikes: expected one of session's fields: hand, spike, got"),
        ("session", r"session: expected an array of numbers, got a struct of spike, hand"),
        ("session.hand.x", r"one of session.hand's fields: none, session.hand is numbers of shape"),
        ("spikes", r"spikes: expected an array of numbers, got text"),
    ):
        with pytest.raises(RecordingError, match=message):
            read(tmp_path / "a.mat", MatSpec(spikes=name))


# ---- values of another kind --------------------------------------------------------------------


ODD: dict[str, Callable[[h5py.File, str], Any]] = {
    "compound": lambda f, n: f.create_dataset(
        n, data=np.zeros(4, dtype=[("a", "f8"), ("b", "i4")])
    ),
    "complex": lambda f, n: f.create_dataset(n, data=np.ones((3, 4), dtype=complex)),
    "opaque": lambda f, n: f.create_dataset(n, data=np.zeros((3, 4), dtype="V5")),
    "text": lambda f, n: f.create_dataset(n, data=np.array([b"a", b"b"])),
    "variable text": lambda f, n: f.create_dataset(n, data=["a", "b"]),
    "not utf-8": lambda f, n: f.create_dataset(n, data=b"\xff\xfe", dtype=h5py.string_dtype()),
    "null dataspace": lambda f, n: f.create_dataset(n, data=h5py.Empty("f8")),
    "scalar": lambda f, n: f.create_dataset(n, data=3.0),
    "empty": lambda f, n: f.create_dataset(n, shape=(0, 0), dtype="f8"),
    "region references": lambda f, n: f.create_dataset(n, (2,), dtype=h5py.regionref_dtype),
    "null references": lambda f, n: f.create_dataset(n, (2, 1), dtype=h5py.ref_dtype),
    "ragged": lambda f, n: f.create_dataset(n, (3,), dtype=h5py.vlen_dtype("f8")),
    "ragged text": lambda f, n: f.create_dataset(n, (3, 1), dtype=h5py.string_dtype()),
    "an enumeration": lambda f, n: f.create_dataset(
        n, data=np.ones((3, 4), "i1"), dtype=h5py.enum_dtype({"a": 0, "b": 1}, "i1")
    ),
    "boolean": lambda f, n: f.create_dataset(n, data=np.ones((2, 40, 3), bool)),
    "group": lambda f, n: f.create_group(n),
    "broken soft link": lambda f, n: f.__setitem__(n, h5py.SoftLink("/nowhere")),
    "broken external link": lambda f, n: f.__setitem__(n, h5py.ExternalLink("no.h5", "/x")),
    "named type": lambda f, n: f.__setitem__(n, np.dtype("f8")),
    "far too large": lambda f, n: f.create_dataset(n, (10**7, 10**7), dtype="f8", chunks=(9, 9)),
    "long double": lambda f, n: f.create_dataset(n, data=np.ones((3, 4), np.longdouble)),
    "cell of itself": lambda f, n: _itself(f, n),
    "cell of a struct": lambda f, n: _of_group(f, n),
    "cell of texts": lambda f, n: cells(f, n, [b"a", b"b"]),
    "text of MATLAB": lambda f, n: f.create_dataset(
        n, data=np.full((3, 40), 97, "u2")
    ).attrs.__setitem__("MATLAB_class", np.bytes_("char")),
    "sparse, damaged": lambda f, n: _sparse(f, n, rows=3, ir=[7], jc=[0, 1, 1]),
    "sparse, endless": lambda f, n: _sparse(f, n, rows=2**40, ir=[0], jc=[0, 1, 1]),
    "sparse of nothing": lambda f, n: f.create_group(n).attrs.__setitem__("MATLAB_sparse", 3),
}


def _itself(file: h5py.File, name: str) -> None:
    made = file.create_dataset(name, (3, 1), dtype=h5py.ref_dtype)
    made[...] = np.array([[made.ref]] * 3, dtype=h5py.ref_dtype)


def _of_group(file: h5py.File, name: str) -> None:
    made = file.create_dataset(name, (2, 1), dtype=h5py.ref_dtype)
    made[0, 0] = file.create_group("#refs#/g").ref


def _sparse(file: h5py.File, name: str, *, rows: int, ir: list[int], jc: list[int]) -> None:
    group = file.create_group(name)
    group.attrs["MATLAB_sparse"] = rows
    group["ir"], group["jc"], group["data"] = ir, jc, np.ones(len(ir))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["spikes", "hand", "t"])
def test_any_type_of_hdf5_is_read_or_named(odd: str, where: str, tmp_path: Path) -> None:
    for timed in (True, False):

        def write(file: h5py.File, timed: bool = timed) -> None:
            good: dict[str, Any] = {"t": T[:, None], "hand": HAND.T, "spikes": COUNTS.T}
            for name, values in good.items():
                if name == where:
                    ODD[odd](file, name)
                elif name == "spikes" and timed:
                    cells(file, name, [t[None] for t in TIMES])
                else:
                    file[name] = values

        path = v73(tmp_path / f"{timed}.mat", write)
        with_error(lambda path=path, timed=timed: read(path, TIMED if timed else BINNED))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["spikes", "k", "c", "group/spikes"])
def test_any_type_in_a_file_of_trials_is_read_or_named(
    odd: str, where: str, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        good = {"spikes": COUNTS.T[None], "k": HAND.T[None], "c": [1.0]}
        for name, values in good.items():
            if name != where:
                file[name] = values
        ODD[odd](file, where)
    group, _, spikes = where.rpartition("/")
    hdf5 = Hdf5Spec(
        group=group, spikes=spikes if group else "spikes", kinematics="k", conditions="c"
    )
    spec = RecordingSpec(bin_width=0.05, mode="trials", hdf5=hdf5)
    with_error(lambda: load_recording(tmp_path / "a.h5", spec))


def with_error(reading: Callable[[], Recording]) -> None:
    """Read; nothing leaves but a recording or the project's own error."""
    try:
        said = len(reading()) > 0
    except RecordingError as error:
        said = error.field and error.got
    assert said


def test_an_object_of_matlabs_own_is_named(tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        file["spikes"], file["hand"] = COUNTS.T, np.ones((6, 1), "u4")
        file["hand"].attrs["MATLAB_class"] = np.bytes_("timetable")
        file["hand"].attrs["MATLAB_object_decode"] = 3

    with pytest.raises(RecordingError, match=r"got an object of MATLAB.s own .class timetable"):
        read(v73(tmp_path / "a.mat", write), BINNED)


def test_a_null_reference_is_a_unit_that_never_fires(tmp_path: Path) -> None:
    def write(file: h5py.File) -> None:
        cells(file, "spikes", [TIMES[0][None], None, TIMES[2][None]])
        file["t"], file["hand"] = T[:, None], HAND.T

    made = read(v73(tmp_path / "a.mat", write), TIMED)
    assert made.counts.sum() == len(TIMES[0]) + len(TIMES[2])


@pytest.mark.parametrize("dtype", [">f8", "<f4", "f2", ">i2", "u1", "?", "g"])
def test_numbers_of_any_width_and_order_are_numbers(dtype: str, tmp_path: Path) -> None:
    counts = (COUNTS > 1).astype(dtype)

    def write(file: h5py.File) -> None:
        file["spikes"], file["hand"] = counts.T, HAND.T

    made = read(v73(tmp_path / "a.mat", write), BINNED)
    np.testing.assert_array_equal(made.counts, (COUNTS > 1).T)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spikes": COUNTS.T}, r"data.mat.spikes_axes: expected the order by which hand, of shape"),
        ({"spikes": COUNTS + 0j}, "spikes: expected an array of numbers, got complex numbers"),
        ({"spikes": "abc"}, "spikes: expected an array of numbers, got text"),
        ({"spikes": [["a", "b"]]}, "spikes: expected an array of numbers, got text"),
        ({"spikes": {"a": 1}}, "got a struct of a"),
        ({"hand": HAND[:, :7]}, r"hand: expected channels x 40 bins, got shape \(2, 7\)"),
    ],
)
def test_version_5_names_what_it_found(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    io.savemat(tmp_path / "a.mat", {"spikes": COUNTS, "hand": HAND} | changed)
    with pytest.raises(RecordingError, match=message):
        read(tmp_path / "a.mat", BINNED)


def test_stamps_of_two_rows_and_cells_of_two_columns_are_named(tmp_path: Path) -> None:
    spikes = np.empty(2, dtype=object)
    spikes[:] = [TIMES[0], np.stack([TIMES[1]] * 2)]
    io.savemat(tmp_path / "a.mat", {"spikes": spikes, "t": T, "hand": HAND})
    with pytest.raises(
        RecordingError, match=r"spikes\{2\}: expected a vector, got shape \(2, 30\)"
    ):
        read(tmp_path / "a.mat", TIMED)
    spikes[1] = TIMES[1]
    io.savemat(tmp_path / "a.mat", {"spikes": spikes, "t": np.stack([T, T + 0.05]), "hand": HAND})
    with pytest.raises(RecordingError, match=r"t: expected 40 times.*got 2x40"):
        read(tmp_path / "a.mat", TIMED)


def test_a_sparse_matrix_with_indices_outside_is_named(tmp_path: Path) -> None:
    matrix = sparse.csc_matrix(COUNTS.astype(float))
    matrix.indices[-1] = 2**30
    io.savemat(tmp_path / "a.mat", {"spikes": matrix, "hand": HAND})
    with pytest.raises(RecordingError, match=r"spikes: .*damaged sparse matrix"):
        read(tmp_path / "a.mat", BINNED)


@pytest.mark.parametrize("suffix", [".mat", ".nwb", ".h5"])
def test_a_name_no_file_can_have_is_named(suffix: str) -> None:
    with pytest.raises(RecordingError, match="recording: expected a file"):
        load_recording(f"a\0{suffix}")


# ---- any bytes, any damage ---------------------------------------------------------------------


def good_file(path: Path) -> tuple[Path, RecordingSpec]:
    """A file of the kind its suffix says, and how to read it."""
    if path.name == "new.mat":
        with h5py.File(path, "w") as file:
            file["hand"] = HAND.T
            cells(file, "spikes", [t[None] for t in TIMES])
            file["t"] = T[:, None]
        return path, RecordingSpec(bin_width=0.05, mat=TIMED)
    if path.suffix == ".mat":
        io.savemat(path, {"spikes": COUNTS, "hand": HAND}, do_compression=path.name == "small.mat")
        return path, RecordingSpec(bin_width=0.05, mat=BINNED)
    with h5py.File(path, "w") as file:
        file["spikes"], file["k"], file["c"] = COUNTS.T[None], HAND.T[None], [1.0]
    hdf5 = Hdf5Spec(spikes="spikes", kinematics="k", conditions="c")
    return path, RecordingSpec(bin_width=0.05, mode="trials", hdf5=hdf5)


@pytest.mark.parametrize("name", ["old.mat", "small.mat", "new.mat", "a.h5"])
def test_damaged_files_end_in_an_error(name: str, tmp_path: Path) -> None:
    path, spec = good_file(tmp_path / name)
    whole = path.read_bytes()

    @FEW
    @given(damages(len(whole)))
    def damaged(damage: Damage) -> None:
        path.write_bytes(spoilt(whole, damage))
        with_error(lambda: load_recording(path, spec))

    damaged()


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
VALUES = st.one_of(
    st.tuples(SHAPES, st.sampled_from(["f8", "i2", "u1", "?", "c16", "f2", "S3"])).map(
        lambda made: np.ones(made[0], dtype=made[1])
    ),
    st.floats(width=32).map(lambda v: np.full((3, 40), v)),
    st.text(max_size=5),
    st.just({"a": np.ones(3)}),
    st.just(np.array([np.ones(2), "x", np.ones((2, 2))], dtype=object)),
)


def test_any_variables_are_read_or_named(tmp_path: Path) -> None:
    @FEW
    @given(st.fixed_dictionaries({"spikes": VALUES, "hand": VALUES, "t": VALUES}))
    def written(values: dict[str, Any]) -> None:
        io.savemat(tmp_path / "a.mat", values)
        for mat in (BINNED, TIMED, MatSpec(trial_starts="t")):
            with_error(lambda mat=mat: read(tmp_path / "a.mat", mat))

    written()
