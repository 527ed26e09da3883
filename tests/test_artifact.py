"""The model file: bit for bit there and back, and refused when anything in it has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ilqr_vae.artifact import (
    KEY,
    MANIFEST_SHA256,
    SCHEMA,
    SINGLE_SCHEMA,
    GroupSpec,
    Manifest,
    ModelSpec,
    build,
    load_artifact,
    read_manifest,
    save_artifact,
)
from ilqr_vae.errors import ArtifactError, ConfigError
from ilqr_vae.model.likelihoods import Poisson
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.recordings import MatSpec, RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig
from small import perturb

UNITS = ("a1", "å2", "c/3")
SHAPES = ModelSpec(
    dynamics="mgu2",
    latents=3,
    inputs=2,
    groups={
        "spikes": GroupSpec(family="poisson", channels=3, log_rate_max=4.25),
        "kinematics": GroupSpec(family="gaussian", channels=2),
    },
)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "bin_width": 0.02,
        "unit_names": UNITS,
        "kinematic_names": ("vx", "vy"),
        "kinematic_units": ("m/s", "m/s"),
        "data": RecordingSpec(bin_width=0.02, mat=MatSpec(spikes="s", kinematic_rows=(0, 1))),
        "horizon": HorizonConfig(horizon=4, iterations=3),
        "model": SHAPES,
        "readout": ReadoutShape(lags=1),
        "scores": {"r2": 0.8732191823712},
        "provenance": {"recording": "made up"},
        "config": {"training": {"steps": 3, "learning_rate": 1e-3}},
    }
    return Manifest(**(fields | changes))


def write(path: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Save a model in general position; returns what was saved."""
    made = manifest(**changes)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(made.model).to(dtype)
    perturb(model, 0.3, generator)
    readout = KinematicReadout(3, 2, ReadoutShape(lags=1)).double()
    for b in readout.buffers():
        b.copy_(torch.rand(b.shape, generator=generator, dtype=torch.float64))
    rate = torch.rand(3, generator=generator, dtype=torch.float64)
    written = save_artifact(path, made, model, readout, rate)
    return {"model": model, "readout": readout, "rate": rate, "manifest": written}


def rewrite(
    path: Path, text: str | None = None, digest: str | None = None, **tensors: torch.Tensor | None
) -> None:
    """A file of another writer: this manifest text and hash, these tensors changed or left out."""
    with safe_open(path, framework="pt") as f:
        metadata = dict(f.metadata())
        kept = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    for name, value in tensors.items():
        kept.pop(name.replace("__", "."))
        if value is not None:
            kept[name.replace("__", ".")] = value
    if text is not None:
        metadata[KEY] = text
    if digest is not None:
        metadata[MANIFEST_SHA256] = digest
    save_file(kept, path, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_there_and_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "m.safetensors"
    saved = write(path, dtype=dtype)
    loaded = load_artifact(path)
    assert loaded.manifest == saved["manifest"] == read_manifest(path)
    assert len(loaded.manifest.model_id) == 12
    assert (loaded.manifest.latents, loaded.manifest.inputs) == (3, 2)
    state = saved["model"].state_dict()
    assert loaded.model.state_dict().keys() == state.keys()
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, state[name].double()), name
    assert loaded.readout is not None
    for name, value in loaded.readout.state_dict().items():
        assert torch.equal(value, saved["readout"].state_dict()[name]), name
    assert torch.equal(loaded.mean_rate, saved["rate"])
    spikes = loaded.model.group("spikes")
    assert isinstance(spikes, Poisson)
    assert spikes.log_rate_max == 4.25
    again = tmp_path / "again.safetensors"
    save_artifact(again, manifest(), saved["model"], saved["readout"], saved["rate"])
    assert load_artifact(again).manifest == loaded.manifest  # its hash is of the tensors


def test_a_loaded_estimator_answers_as_the_saved_model(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    counts, mask = torch.ones(1, 3).double(), torch.ones(1, 3).double()
    answers = [
        e.step(e.init(), counts, mask)[1] for e in (load_artifact(path).estimator() for _ in "ab")
    ]
    assert torch.equal(answers[0].kinematics, answers[1].kinematics)
    assert answers[0].kinematics.shape == (1, 2)
    changed = load_artifact(path).estimator(iterations=7, horizon=9)
    assert (changed.config.iterations, changed.config.horizon) == (7, 9)
    for wrong in ({"iterations": 0}, {"horizon": 0}, {"horizon": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load_artifact(path).estimator(**wrong)


def test_no_readout_without_kinematics(tmp_path: Path) -> None:
    path, made = (
        tmp_path / "m.safetensors",
        manifest(kinematic_names=(), kinematic_units=(), readout=None),
    )
    save_artifact(path, made, build(SHAPES), None, torch.ones(3, dtype=torch.float64))
    assert load_artifact(path).readout is None


def test_a_changed_byte_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert 1000 < header < len(whole)
    for i, offset in enumerate([*range(16), *range(16, len(whole), 11), len(whole) - 1]):
        bad = bytearray(whole)
        bad[offset] ^= (0x01, 0x20, 0xFF)[i % 3]  # 0x20: the case of a letter
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"m\.safetensors"):
            load_artifact(path)
    path.write_bytes(whole)
    load_artifact(path)


def test_a_file_cut_or_continued_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            load_artifact(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtifactError):
        load_artifact(path)


def test_what_is_no_model_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    for path, said in [
        (tmp_path / "absent.safetensors", "absent.safetensors"),
        (tmp_path, "a folder, pipe or device"),
        (Path("/dev/null"), "a folder, pipe or device"),
        (plain, "none in its metadata"),
    ]:
        with pytest.raises(ArtifactError, match=said):
            load_artifact(path)


def test_another_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for schema in (SCHEMA + 1, 0):
        write(path)
        text = msgspec.json.encode(read_manifest(path)).decode()
        rewrite(path, text.replace(f'"schema":{SINGLE_SCHEMA}', f'"schema":{schema}'))
        said = rf"expected schema version {SINGLE_SCHEMA} to {SCHEMA} .*newer.*, got {schema}"
        with pytest.raises(ArtifactError, match=said):
            load_artifact(path)
    for text in ("[]", "{", "null", '"x"'):
        write(path)
        rewrite(path, text)
        with pytest.raises(ArtifactError):
            load_artifact(path)


def test_a_manifest_altered_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    text = msgspec.json.encode(read_manifest(path)).decode()
    rewrite(path, text)
    load_artifact(path)  # the same text: the writer does not matter
    rewrite(path, text.replace('"bin_width":0.02', '"bin_width":0.05'))
    with pytest.raises(ArtifactError, match="differs from its hash"):
        load_artifact(path)


def test_the_id_is_of_the_weights_and_of_what_decides_their_answers(tmp_path: Path) -> None:
    """Same weights for other units, another bin width, ...: another model."""
    path = tmp_path / "m.safetensors"
    ids = {name: write(path, **changes)["manifest"].model_id for name, changes in SAME.items()}
    assert len(set(ids.values())) == 1, ids
    others = {name: write(path, **changes)["manifest"].model_id for name, changes in OTHER.items()}
    assert len({*others.values(), *ids.values()}) == len(OTHER) + 1, others
    assert load_artifact(path).manifest.model_id == list(others.values())[-1]
    forged = msgspec.structs.replace(read_manifest(path), model_id="0" * 12)
    text = msgspec.json.encode(forged)
    rewrite(path, text.decode(), digest=hashlib.sha256(text).hexdigest())
    with pytest.raises(ArtifactError, match=r"expected model id .*, got 000000000000"):
        load_artifact(path)


SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "scores": {"scores": {"r2": 0.1}},
    "provenance": {"provenance": {"recording": "another"}},
    "config": {"config": {}},
}
OTHER: dict[str, dict[str, Any]] = {
    "units": {"unit_names": UNITS[::-1]},
    "bin width": {"bin_width": 0.05},
    "kinematic units": {"kinematic_units": ("mm/s", "mm/s")},
    "kinematic names": {"kinematic_names": ("vy", "vx")},
    "iterations": {"horizon": HorizonConfig(horizon=4, iterations=2)},
    "recording": {"data": RecordingSpec(bin_width=0.02)},
}


def test_an_unknown_key_in_the_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    rewrite(path, msgspec.json.encode(read_manifest(path)).decode()[:-1] + ',"new":1}')
    with pytest.raises(ArtifactError):
        load_artifact(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unit_names": ("a", "b")}, "2 named units, got one of 3"),
        ({"kinematic_names": ("vx",)}, "readout"),
        ({"readout": ReadoutShape()}, "readout"),
        ({"model": msgspec.structs.replace(SHAPES, groups={})}, "spikes"),
    ],
    ids=["units", "kinematics", "lags", "no spikes"],
)
def test_counts_that_disagree_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "m.safetensors"
    model = build(SHAPES)
    readout, rate = (
        KinematicReadout(3, 2, ReadoutShape(lags=1)).double(),
        torch.ones(3, dtype=torch.float64),
    )
    save_artifact(path, manifest(**changes), model, readout, rate)
    with pytest.raises(ArtifactError, match=said):
        load_artifact(path)


def test_shapes_other_than_the_manifests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    readout, rate = (
        KinematicReadout(3, 2, ReadoutShape(lags=1)).double(),
        torch.ones(3, dtype=torch.float64),
    )
    smaller = build(msgspec.structs.replace(SHAPES, inputs=1))
    save_artifact(path, manifest(), smaller, readout, rate)
    with pytest.raises(ArtifactError, match=r"model\.\*"):
        load_artifact(path)
    save_artifact(path, manifest(), build(SHAPES), readout, rate[:2])
    with pytest.raises(ArtifactError, match="mean_rate of 3 units"):
        load_artifact(path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = build(SHAPES)
    with torch.no_grad():
        model.group("spikes").b[1] = float("nan")
    readout, rate = (
        KinematicReadout(3, 2, ReadoutShape(lags=1)).double(),
        torch.ones(3, dtype=torch.float64),
    )
    save_artifact(path, manifest(), model, readout, rate)
    with pytest.raises(ArtifactError, match=r"model\.groups\.spikes\.b with values that are not"):
        load_artifact(path)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dynamics", {"dynamics": "lstm"}),
        ("prior", {"prior": "laplace"}),
        ("spikes", {"groups": {"spikes": GroupSpec(family="binomial", channels=3)}}),
    ],
)
def test_an_unknown_family_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=field):
        build(msgspec.structs.replace(SHAPES, **changes))


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    before = path.read_bytes()
    blocked = tmp_path / "folder.safetensors"
    blocked.mkdir()  # cannot be replaced by a file
    with pytest.raises(ConfigError, match="can be written"):
        write(blocked)
    with pytest.raises(ConfigError, match="can be written"):
        write(tmp_path / "absent" / "m.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "m.safetensors"]
    assert path.read_bytes() == before
    write(path)  # over the old one
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({"horizon": {"horizon": h}}, "horizon.horizon") for h in (0, -5, 10**6, 2**62)),
        *(({"horizon": {"iterations": k}}, "horizon.iterations") for k in (0, 10**6, 2**62)),
        ({"horizon": {"tolerance": -1.0}}, "horizon.tolerance"),
        *(({"bin_width": w}, "bin_width") for w in (0.0, -0.02, 1e300)),
        *(({"model": {"latents": n}}, "model.latents") for n in (0, -1, 2**40)),
        ({"model": {"inputs": 2**40}}, "model.inputs"),
        ({"readout": {"lags": 2**40}}, "readout.lags"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    """With its hash, as if a program had written it."""
    path = tmp_path / "m.safetensors"
    raw = msgspec.to_builtins(write(path)["manifest"])
    for name, value in changes.items():
        raw[name] = raw[name] | value if isinstance(value, dict) else value
    text = msgspec.json.encode(raw).decode()
    rewrite(path, text, hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(ArtifactError, match=rf"a valid manifest.*\$\.{field}"):
        load_artifact(path)


def test_a_manifest_of_brackets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    rewrite(path, "[" * 200_000, "")
    with pytest.raises(ArtifactError, match="a valid manifest"):
        load_artifact(path)
