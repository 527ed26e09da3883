"""The model file: one .safetensors file with a manifest inside. No pickle, nothing executable.

Tensors: ``model.*`` (the generative model), ``readout.*`` (if there are kinematics), ``mean_rate``,
    ``seen.*`` (statistics of the training part), ``intervals.*`` (scale of the deviations by speed)
    and ``classes.*`` (the discrete output); files without the last three load. In an ensemble these
    are the tensors of the first member; ``member.1.model.*``, ``member.1.readout.*`` and
    ``member.1.seen.*`` are those of the second, and so on; ``mean_rate`` and ``intervals.*`` are
    common.

The manifest is JSON in the metadata of the file under ``ilqr_vae``. It contains a hash of all
tensors, and its own hash is stored beside it. Both are checked on load, so that a file with a
flipped bit is refused. Files are written atomically.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ilqr_vae.errors import ArtifactError, ConfigError, number_of
from ilqr_vae.files import write_whole
from ilqr_vae.model.classes import ClassReadout
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.model.spec import GroupSpec as GroupSpec
from ilqr_vae.model.spec import ModelSpec as ModelSpec
from ilqr_vae.model.spec import build as build
from ilqr_vae.recordings import RecordingSpec, RecordingWarning
from ilqr_vae.streaming.bounds import TrainingRange
from ilqr_vae.streaming.ensemble import EnsembleHorizon, Horizon
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon

SINGLE_SCHEMA, SCALED_SCHEMA, CLASSES_SCHEMA, SCHEMA = 3, 4, 5, 6
"""Written: 6 with features, 5 with classes or fixed-lag decodes, 4 with members or intervals."""
KEY = "ilqr_vae"
MANIFEST_SHA256 = "ilqr_vae.sha256"


class MemberSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The part of the manifest that is specific to a further member of an ensemble.

    Attributes:
        readout: shape of its readout; None without kinematics.
    """

    readout: ReadoutShape | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The description of a model file.

    Attributes:
        model_id: 12 hex digits over ``sha256`` and every field above ``scores``: all that affects
            the answers. Files that differ only in scores, provenance or configuration share it.
        sha256: hash of the tensors.
        bin_width: bin width in seconds.
        unit_names: names of the units, in the order of the counts, then those of features.
        features: names of the features, the last of ``unit_names``; absent for counts alone.
        data: how the recording was read, so that a replay reads it in the same way.
        horizon: settings of the estimator.
        model: shapes and families.
        readout: shape of the readout; None without kinematics.
        members: further members of an ensemble; absent for a single model.
        classes: names of the C classes; absent for a model without classes.
        scores: causal validation scores; for ``coverage_90`` see ``measured``.
        provenance: recording name and hash, versions, seed, time.
        config: the whole training configuration.
        history: (step, score) of each validation during training.
        warnings: warnings about the training recording.
    """

    schema: int = SCHEMA
    model_id: str = ""
    sha256: str = ""
    bin_width: Annotated[float, msgspec.Meta(ge=1e-6, le=3600)]
    unit_names: tuple[str, ...]
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    data: RecordingSpec
    horizon: HorizonConfig
    model: ModelSpec
    readout: ReadoutShape | None = None
    members: tuple[MemberSpec, ...] | msgspec.UnsetType = msgspec.UNSET
    classes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    features: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    scores: dict[str, float] = msgspec.field(default_factory=dict)
    provenance: dict[str, str] = msgspec.field(default_factory=dict)
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    history: tuple[tuple[int, float], ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()

    @property
    def latents(self) -> int:
        return self.model.latents

    @property
    def inputs(self) -> int:
        return self.model.inputs

    @property
    def measured(self) -> dict[str, float]:
        """``scores`` without ``coverage_90``, which is 90 % by construction.

        The intervals were calibrated on the same bins, so it says nothing about others.
        """
        return {name: score for name, score in self.scores.items() if name != "coverage_90"}


@dataclass(frozen=True)
class Artifact:
    """A loaded model file.

    Attributes:
        manifest: see ``Manifest``.
        model, readout, mean_rate: on the requested device and in the requested dtype.
        seen: statistics of the training part; None if the file lacks them.
        intervals: scale of the kinematics' deviations by speed; None leaves them as they are.
        others: further members of an ensemble.
        classes: discrete output, from the latents of the first member, or None.
    """

    manifest: Manifest
    model: Model
    readout: KinematicReadout | None
    mean_rate: Tensor
    seen: TrainingRange | None = None
    intervals: SpeedScale | None = None
    others: tuple[Artifact, ...] = ()
    classes: ClassReadout | None = None

    @property
    def members(self) -> tuple[Artifact, ...]:
        """Each member as a model, with unscaled intervals; itself for a single model."""
        if not self.others:
            return (self,)
        return (replace(self, intervals=None, others=()), *self.others)

    def estimator(self, *, iterations: int | None = None, horizon: int | None = None) -> Horizon:
        """Return the moving-horizon estimator, with the settings of the file unless overridden.

        Raises:
            ConfigError: iterations or horizon below one, or a horizon too short for the readout.
        """
        config = self.manifest.horizon
        config = msgspec.structs.replace(
            config,
            iterations=config.iterations if iterations is None else iterations,
            horizon=config.horizon if horizon is None else horizon,
        )
        shapes = [m.manifest.readout or ReadoutShape() for m in self.members]
        least = max(1, *(max(shape.lags, shape.residuals) for shape in shapes))
        if config.iterations < 1:
            raise ConfigError("iterations", expected="at least 1", got=str(config.iterations))
        if config.horizon < least:
            raise ConfigError("horizon", expected=f"at least {least}", got=str(config.horizon))
        scale = None if self.others else self.intervals
        made = [
            MovingHorizon(m.model, m.readout, m.mean_rate, config, m.seen, scale)
            for m in self.members
        ]
        return EnsembleHorizon(made, self.intervals) if self.others else made[0]


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {"mean_rate": artifact.mean_rate}
    for i, member in enumerate(artifact.members):
        prefix = _prefix(i)
        named |= {f"{prefix}model.{k}": v for k, v in member.model.state_dict().items()}
        if member.readout is not None:
            named |= {f"{prefix}readout.{k}": v for k, v in member.readout.state_dict().items()}
        if member.seen is not None:
            named |= {f"{prefix}seen.{k}": v for k, v in member.seen._asdict().items()}
    for what, found in (("intervals", artifact.intervals), ("classes", artifact.classes)):
        named |= {f"{what}.{k}": v for k, v in (found._asdict() if found else {}).items()}
    # copy, since members may share tensors, which safetensors refuses
    return {k: v.detach().cpu().contiguous().clone() for k, v in sorted(named.items())}


def _prefix(member: int) -> str:
    return f"member.{member}." if member else ""


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        sha.update(t.numpy().tobytes())
    return sha.hexdigest()


def _identity(written: Mapping[str, Any]) -> str:
    """Return the model id: a hash over the tensors' hash and the fields that affect answers.

    Args:
        written: manifest as written, so that files from before a field was added keep their ids.
    """
    model = written["model"]
    blank = {"model_id": "", "scores": {}, "provenance": {}, "config": {}, "history": []}
    same = {**written, **blank, "model": {**model, "groups": dict(sorted(model["groups"].items()))}}
    same.pop("warnings", None)
    return hashlib.sha256(msgspec.json.encode(same)).hexdigest()[:12]


def save_artifact(
    path: str | Path,
    manifest: Manifest,
    model: Model,
    readout: KinematicReadout | None,
    mean_rate: Tensor,
    seen: TrainingRange | None = None,
    intervals: SpeedScale | None = None,
    others: Sequence[Artifact] = (),
    classes: ClassReadout | None = None,
) -> Manifest:
    """Write a model file; return the manifest with its hash.

    Args:
        others: further members of an ensemble.
        classes: discrete output for the classes in the manifest.

    Raises:
        ConfigError: the file could not be written.
    """
    made = Artifact(manifest, model, readout, mean_rate, seen, intervals, tuple(others), classes)
    tensors = _tensors(made)
    later = any(m.readout is not None and m.readout.shape.later for m in made.members)
    features = sum(group.features or 0 for group in manifest.model.groups.values())
    schema = SCALED_SCHEMA if others or intervals is not None else SINGLE_SCHEMA
    manifest = msgspec.structs.replace(
        manifest,
        schema=SCHEMA if features else CLASSES_SCHEMA if later or classes else schema,
        features=manifest.unit_names[-features:] if features else msgspec.UNSET,
        sha256=_digest(tensors),
        members=tuple(MemberSpec(readout=m.manifest.readout) for m in others) or msgspec.UNSET,
    )
    written = msgspec.json.decode(msgspec.json.encode(manifest))
    manifest = msgspec.structs.replace(manifest, model_id=_identity(written))
    text = msgspec.json.encode(manifest)
    hashed = {KEY: text.decode(), MANIFEST_SHA256: hashlib.sha256(text).hexdigest()}
    write_whole(path := Path(path), save(tensors, metadata=hashed), f"model file {path.name}")
    return manifest


def _refuse(path: Path, expected: str, got: str) -> ArtifactError:
    return ArtifactError(f"model file {path.name}", expected=expected, got=got)


def _read(path: Path) -> tuple[dict[str, Tensor], Manifest]:
    try:
        if path.exists() and not path.is_file():  # the library would wait for a pipe, without end
            raise OSError("a folder, pipe or device")
        with safe_open(path, framework="pt", device="cpu") as f:  # pyright: ignore[reportPrivateImportUsage]
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise _refuse(path, "a readable .safetensors file", str(error)) from error
    if KEY not in metadata:
        raise _refuse(path, "a manifest written by ilqr-vae train", "none in its metadata")
    try:
        raw = msgspec.json.decode(metadata[KEY])
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema not in range(SINGLE_SCHEMA, SCHEMA + 1):
            expected = f"schema version {SINGLE_SCHEMA} to {SCHEMA} (what this ilqr-vae reads; "
            expected += "for a later one install a newer ilqr-vae)"
            raise _refuse(path, expected, str(schema))
        if hashlib.sha256(metadata[KEY].encode()).hexdigest() != metadata.get(MANIFEST_SHA256):
            raise _refuse(path, "the manifest that was written", "one that differs from its hash")
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _refuse(path, "a valid manifest", str(error)) from error
    if manifest.model_id != (identity := _identity(raw)):
        raise _refuse(path, f"model id {identity}", manifest.model_id)
    return tensors, manifest


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest after checking the whole file. Raises ArtifactError."""
    return load_artifact(path).manifest


def _load_into(path: Path, module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    part = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    if expected != (got := {k: tuple(v.shape) for k, v in part.items()}):
        odd = sorted(set(expected.items()) ^ set(got.items()))
        raise _refuse(path, f"{prefix}* of the manifest's shapes", f"a difference at {odd[0]}")
    module.load_state_dict(part)


def _intervals(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> SpeedScale | None:
    channels, knots = len(manifest.kinematic_names), tensors.get("intervals.knots")
    count = 0 if knots is None else knots.numel()
    sizes = ((channels,), (count,), (count, channels))
    made = _optional(path, SpeedScale, "intervals.", sizes, tensors)
    if made and (count < 2 or not bool((made.knots.diff() > 0).all() and (made.factors > 0).all())):
        raise _refuse(path, "intervals of increasing knots, positive factors", "others")
    return made


def _classes(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> ClassReadout | None:
    count, lags = len(manifest.classes or ()), (manifest.readout or ReadoutShape()).lags
    sizes = ((count, (lags + 1) * manifest.latents), (count,))
    made = _optional(path, ClassReadout, "classes.", sizes, tensors)
    if (made is None) != (count == 0):
        raise _refuse(path, f"classes.* of the {count} classes named", "none, or unnamed ones")
    return made


Optionals = TypeVar("Optionals", TrainingRange, SpeedScale, ClassReadout)


def _optional(
    path: Path,
    kind: type[Optionals],
    prefix: str,
    sizes: tuple[tuple[int, ...], ...],
    tensors: dict[str, Tensor],
) -> Optionals | None:
    """Return tensors of these names and sizes; None if there is none with this prefix."""
    got = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith(prefix)}
    if not got:
        return None
    expected = {f"{prefix}{name}": size for name, size in zip(kind._fields, sizes, strict=True)}
    if got != expected:
        raise _refuse(path, f"{prefix}* of shapes {expected}", str(got))
    return kind(*(tensors[name] for name in expected))


def load_artifact(
    path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> Artifact:
    """Read and check a model file.

    Args:
        device: device of the computation.
        dtype: floating-point type; streaming and offline scores use float64.

    Raises:
        ArtifactError: it is not a model file, has another schema, shapes that differ from the
            manifest, non-finite values, or a wrong hash or id.
    """
    tensors, manifest = _read(path := Path(path))
    if (digest := _digest(tensors)) != manifest.sha256:
        raise _refuse(path, f"tensors with hash {manifest.sha256[:12]}", digest[:12])
    for name, t in tensors.items():
        if not bool(t.isfinite().all()):
            raise _refuse(path, "finite tensors", f"{name} with values that are not")
    units = len(manifest.unit_names)
    spikes = manifest.model.groups.get("spikes")
    if spikes is None or spikes.channels != units:
        got = "none" if spikes is None else f"one of {spikes.channels}"
        raise _refuse(path, f"a group of spikes of the {units} named units", got)
    if len(manifest.features or ()) != (spikes.features or 0):
        wanted = f"names of {number_of(spikes.features or 0, 'feature')}"
        raise _refuse(path, wanted, str(manifest.features))
    if "mean_rate" not in tensors or tensors["mean_rate"].shape != (units,):
        raise _refuse(path, f"mean_rate of {number_of(units, 'unit')}", "another shape")
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    first = _member(path, manifest, tensors, 0, where)
    others = [
        _member(path, msgspec.structs.replace(manifest, readout=own.readout), tensors, i, where)
        for i, own in enumerate(manifest.members or (), 1)
    ]
    scale, classes = _intervals(path, manifest, tensors), _classes(path, manifest, tensors)
    return replace(first, intervals=scale, others=tuple(others), classes=classes)


def _member(
    path: Path,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    index: int,
    where: dict[str, Any],
) -> Artifact:
    """Return a member as a model; ``manifest`` has its readout, ``where`` device and dtype."""
    prefix, units = _prefix(index), len(manifest.unit_names)
    channels = len(manifest.kinematic_names)
    model = build(manifest.model).double()  # a file may hold float64, which float32 would round
    _load_into(path, model, tensors, f"{prefix}model.")
    readout = None
    if manifest.readout is not None:
        readout = KinematicReadout(manifest.latents, channels, manifest.readout, units=units)
        _load_into(path, readout, tensors, f"{prefix}readout.")
        # buffers are stored in float64, which float32 would round
        for name, _ in list(readout.named_buffers()):
            setattr(readout, name, tensors[f"{prefix}readout.{name}"])
        readout = readout.to(**where)
    sizes = ((units,), (2, manifest.latents), (2, channels))
    seen = _optional(path, TrainingRange, f"{prefix}seen.", sizes, tensors)
    return Artifact(manifest, model.to(**where), readout, tensors["mean_rate"].to(**where), seen)
