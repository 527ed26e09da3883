"""The model file: one .safetensors file with a manifest inside. No pickle, nothing executable.

Tensors: ``model.*`` (the generative model), ``readout.*`` (where there are kinematics),
``mean_rate``, ``seen.*`` (what the training part showed), ``intervals.*`` (the deviations' scale
by speed) and ``classes.*`` (the discrete output); files without the last three load. Of an ensemble
these are the first member's, and ``member.1.model.*``, ``member.1.readout.*``, ``member.1.seen.*``
are the second's, and so on; ``mean_rate`` and ``intervals.*`` are of all.

The manifest is JSON in the file's metadata under ``ilqr_vae``. It carries a hash of all tensors,
and its own hash stands beside it; both are checked on load: a file with a flipped bit is refused.
Written atomically.
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

from ilqr_vae.errors import ArtifactError, ConfigError
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

SINGLE_SCHEMA, SCALED_SCHEMA, SCHEMA = 3, 4, 5
"""Written: 5 with classes or decodes that wait, else 4 with members or scaled intervals, else 3."""
KEY = "ilqr_vae"
MANIFEST_SHA256 = "ilqr_vae.sha256"


class MemberSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a further member of an ensemble has of its own.

    Attributes:
        readout: what its readout reads, None without kinematics.
    """

    readout: ReadoutShape | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a user or a client wants to know about a model file.

    Attributes:
        model_id: 12 hex digits over ``sha256`` and every field above ``scores``: all that decides
            what is answered to whom. Files that differ in scores, provenance or configuration
            alone share it.
        sha256: of the tensors.
        bin_width: seconds.
        unit_names: in the order of the counts.
        data: how the recording was read; a replay reads it the same way.
        horizon: the estimator's settings.
        model: shapes and families.
        readout: what the readout reads, None without kinematics.
        members: of an ensemble those after the first; not in the file of one model.
        classes: names of the C classes; not in the file of a model without.
        scores: causal validation scores; ``coverage_90`` among them is none (``measured``).
        provenance: recording name and hash, versions, seed, time.
        config: the whole training configuration.
        history: (step, score) of each validation while training.
        warnings: what was odd about the recording trained on.
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
        """``scores`` without ``coverage_90``: the intervals were scaled on those very bins until
        they cover 90 % of them, so it says nothing about other bins."""
        return {name: score for name, score in self.scores.items() if name != "coverage_90"}


@dataclass(frozen=True)
class Artifact:
    """A loaded model file.

    Attributes:
        manifest: see ``Manifest``.
        model, readout, mean_rate: on the device and in the dtype asked for.
        seen: what the training part showed, None where the file does not say.
        intervals: scale of the kinematics' deviations by speed; None leaves them as they are.
        others: the members of an ensemble after the first.
        classes: the discrete output, from the first member's latents; None without.
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
        """Each member as a model of its own, its intervals not scaled; itself for one model."""
        if not self.others:
            return (self,)
        return (replace(self, intervals=None, others=()), *self.others)

    def estimator(self, *, iterations: int | None = None, horizon: int | None = None) -> Horizon:
        """The moving-horizon estimator, with the file's settings unless overridden.

        Raises:
            ConfigError: iterations or horizon below one, or a horizon shorter than
                what the readout reads.
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
    # copies: members may share tensors, which safetensors refuses
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
    """The model id: of the tensors' hash and of what decides which answers they give.

    Args:
        written: the manifest as the file has it, so that files from before a field was added keep
            their ids.
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
    """Write a model file; returns the manifest with its hash.

    Args:
        others: members of an ensemble after the first.
        classes: the discrete output, of the classes that the manifest names.

    Raises:
        ConfigError: the file cannot be written.
    """
    made = Artifact(manifest, model, readout, mean_rate, seen, intervals, tuple(others), classes)
    tensors = _tensors(made)
    later = any(m.readout is not None and m.readout.shape.later for m in made.members)
    schema = SCALED_SCHEMA if others or intervals is not None else SINGLE_SCHEMA
    manifest = msgspec.structs.replace(
        manifest,
        schema=SCHEMA if later or classes is not None else schema,
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
        with safe_open(path, framework="pt", device="cpu") as f:  # pyright: ignore[reportPrivateImportUsage]
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise _refuse(path, "a readable .safetensors file", str(error)) from error
    if KEY not in metadata:
        raise _refuse(path, "a manifest written by ilqr-vae train", "none in its metadata")
    try:
        raw = msgspec.json.decode(metadata[KEY])
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema not in (SINGLE_SCHEMA, SCALED_SCHEMA, SCHEMA):
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
    """The manifest, after checking the whole file. Raises ArtifactError."""
    return load_artifact(path).manifest


def _load_into(path: Path, module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    part = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in part.items()}
    if expected != got:
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
    """Tensors of these names and sizes; None where there is none whose name begins so."""
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
        device: where to compute.
        dtype: to compute in; streaming and offline scores use float64.

    Raises:
        ArtifactError: not a model file, another schema, shapes that differ from the manifest's,
            values that are not finite, or a hash or id that does not match.
    """
    path = Path(path)
    tensors, manifest = _read(path)
    digest = _digest(tensors)
    if digest != manifest.sha256:
        raise _refuse(path, f"tensors with hash {manifest.sha256[:12]}", digest[:12])
    for name, t in tensors.items():
        if not bool(t.isfinite().all()):
            raise _refuse(path, "finite tensors", f"{name} with values that are not")
    units = len(manifest.unit_names)
    spikes = manifest.model.groups.get("spikes")
    if spikes is None or spikes.channels != units:
        got = "none" if spikes is None else f"one of {spikes.channels}"
        raise _refuse(path, f"a group of spikes of the {units} named units", got)
    if "mean_rate" not in tensors or tensors["mean_rate"].shape != (units,):
        raise _refuse(path, f"mean_rate of {units} units", "another shape")
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
    """A member as a model of its own.

    Args:
        manifest: with its readout's shape.
        where: device and dtype.
    """
    prefix, units = _prefix(index), len(manifest.unit_names)
    channels = len(manifest.kinematic_names)
    model = build(manifest.model).double()  # a file may hold float64, which float32 would round
    _load_into(path, model, tensors, f"{prefix}model.")
    readout = None
    if manifest.readout is not None:
        readout = KinematicReadout(manifest.latents, channels, manifest.readout, units=units)
        _load_into(path, readout, tensors, f"{prefix}readout.")
        # the buffers are stored in float64, and float32 ones would round them
        for name, _ in list(readout.named_buffers()):
            setattr(readout, name, tensors[f"{prefix}readout.{name}"])
        readout = readout.to(**where)
    sizes = ((units,), (2, manifest.latents), (2, channels))
    seen = _optional(path, TrainingRange, f"{prefix}seen.", sizes, tensors)
    return Artifact(manifest, model.to(**where), readout, tensors["mean_rate"].to(**where), seen)
