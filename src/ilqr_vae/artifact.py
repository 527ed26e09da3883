"""The model file: one .safetensors file with a manifest inside. No pickle, nothing executable.

Tensors: ``model.*`` (the generative model), ``readout.*`` (where there are kinematics),
``mean_rate``, and ``seen.*`` (what the training part showed; files without it load). The manifest
is JSON in the file's metadata under ``ilqr_vae``. It carries a hash of all tensors, and its own
hash stands beside it; both are checked on load: a file with a flipped bit is refused. Written
atomically.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ilqr_vae.errors import ArtifactError, ConfigError
from ilqr_vae.files import write_whole
from ilqr_vae.model.dynamics import FAMILIES, DynamicsOptions
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import LIKELIHOODS, Counts, Likelihood, Poisson
from ilqr_vae.model.priors import INPUT_PRIORS, InitialPrior, InputPrior, StudentPrior
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.recordings import RecordingSpec, RecordingWarning
from ilqr_vae.streaming.bounds import TrainingRange
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon

SCHEMA = 3
KEY = "ilqr_vae"
MANIFEST_SHA256 = "ilqr_vae.sha256"


class GroupSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One observation group.

    Attributes:
        family: name of the likelihood.
        channels: how many.
        log_rate_max: poisson: where the exp link goes linear.
        gain, floor: of the Poisson families, see ``likelihoods.Counts``.
    """

    family: str
    channels: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    log_rate_max: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 6.0
    gain: bool = False
    floor: float = 0.0


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What it takes to build a model of the right shape before its tensors are loaded.

    Attributes:
        dynamics, prior: family names.
        latents, inputs: n and m.
        groups: the observation groups.
        options: choices within the dynamics family.
        nu: of a fresh Student prior.
        initial_mean: whether the mean of z_0 is learned; else zero, as surrogate bins have it.
    """

    dynamics: str
    prior: str = "gaussian"
    latents: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    inputs: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    groups: dict[str, GroupSpec]
    options: DynamicsOptions = DynamicsOptions()
    nu: float = 5.0
    initial_mean: bool = True


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


def build(spec: ModelSpec) -> Model:
    """A model of these shapes with fresh parameters. Raises ArtifactError: an unknown family."""
    for field, name, known in (
        ("model.dynamics", spec.dynamics, FAMILIES),
        ("model.prior", spec.prior, INPUT_PRIORS),
        *((f"model.groups.{k}", g.family, LIKELIHOODS) for k, g in spec.groups.items()),
    ):
        if name not in known:
            raise ArtifactError(field, expected=f"one of {', '.join(known)}", got=repr(name))
    groups: dict[str, Likelihood] = {}
    for name, g in spec.groups.items():
        kind = LIKELIHOODS[g.family]
        given: dict[str, Any] = {"log_rate_max": g.log_rate_max} if kind is Poisson else {}
        if issubclass(kind, Counts):
            if not 0 <= g.floor < math.inf:
                field = f"model.groups.{name}.floor"
                raise ArtifactError(field, expected="zero or more", got=f"{g.floor:g}")
            given |= {"gain": g.gain, "floor": g.floor}
        groups[name] = kind(spec.latents, g.channels, **given)
    prior: InputPrior
    if spec.prior == StudentPrior.family:
        if not spec.nu > 2:
            raise ArtifactError("model.nu", expected="above 2", got=f"{spec.nu:g}")
        prior = StudentPrior(spec.inputs, nu=spec.nu)
    else:
        prior = INPUT_PRIORS[spec.prior](spec.inputs)
    return Model(
        FAMILIES[spec.dynamics].from_options(spec.latents, spec.inputs, spec.options),
        prior,
        InitialPrior(spec.latents, learn_mean=spec.initial_mean),
        groups,
    )


@dataclass(frozen=True)
class Artifact:
    """A loaded model file.

    Attributes:
        manifest: see ``Manifest``.
        model, readout, mean_rate: on the device and in the dtype asked for.
        seen: what the training part showed, None where the file does not say.
    """

    manifest: Manifest
    model: Model
    readout: KinematicReadout | None
    mean_rate: Tensor
    seen: TrainingRange | None = None

    def estimator(
        self, *, iterations: int | None = None, horizon: int | None = None
    ) -> MovingHorizon:
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
        shape = self.manifest.readout or ReadoutShape()
        least = max(1, shape.lags, shape.residuals)
        if config.iterations < 1:
            raise ConfigError("iterations", expected="at least 1", got=str(config.iterations))
        if config.horizon < least:
            raise ConfigError("horizon", expected=f"at least {least}", got=str(config.horizon))
        return MovingHorizon(self.model, self.readout, self.mean_rate, config, self.seen)


def _tensors(
    model: Model,
    readout: KinematicReadout | None,
    mean_rate: Tensor,
    seen: TrainingRange | None,
) -> dict[str, Tensor]:
    named = {f"model.{k}": v for k, v in model.state_dict().items()}
    if readout is not None:
        named |= {f"readout.{k}": v for k, v in readout.state_dict().items()}
    named["mean_rate"] = mean_rate
    if seen is not None:
        named |= {f"seen.{k}": v for k, v in seen._asdict().items()}
    return {k: v.detach().cpu().contiguous() for k, v in sorted(named.items())}


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
) -> Manifest:
    """Write a model file; returns the manifest with its hash.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = Path(path)
    tensors = _tensors(model, readout, mean_rate, seen)
    manifest = msgspec.structs.replace(manifest, sha256=_digest(tensors))
    written = msgspec.json.decode(msgspec.json.encode(manifest))
    manifest = msgspec.structs.replace(manifest, model_id=_identity(written))
    text = msgspec.json.encode(manifest)
    hashed = {KEY: text.decode(), MANIFEST_SHA256: hashlib.sha256(text).hexdigest()}
    blob = save(tensors, metadata=hashed)
    write_whole(path, blob, f"model file {path.name}")
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
        if schema != SCHEMA:
            expected = f"schema version {SCHEMA} (as this version's ilqr-vae train writes)"
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


def _seen(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> TrainingRange | None:
    names = [name for name in tensors if name.startswith("seen.")]
    if not names:
        return None
    units, channels = len(manifest.unit_names), len(manifest.kinematic_names)
    sizes = ((units,), (2, manifest.latents), (2, channels))
    expected = {f"seen.{k}": v for k, v in zip(TrainingRange._fields, sizes, strict=True)}
    got = {name: tuple(tensors[name].shape) for name in names}
    if got != expected:
        raise _refuse(path, f"training ranges of shapes {expected}", str(got))
    return TrainingRange(*(tensors[f"seen.{name}"] for name in TrainingRange._fields))


def load_artifact(
    path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> Artifact:
    """Read and check a model file.

    Args:
        device: where to compute.
        dtype: to compute in; streaming and offline scores use float64.

    Raises:
        ArtifactError: not there, not safetensors, no manifest, another schema, shapes that differ
            from the manifest's, values that are not finite, or a hash or id that does not match.
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
    model = build(manifest.model).double()  # a file may hold float64, which float32 would round
    _load_into(path, model, tensors, "model.")
    readout = None
    if manifest.readout is not None:
        channels = len(manifest.kinematic_names)
        readout = KinematicReadout(manifest.latents, channels, manifest.readout, units=units)
        _load_into(path, readout, tensors, "readout.")
        # the buffers are stored in float64, and float32 ones would round them
        for name, _ in list(readout.named_buffers()):
            setattr(readout, name, tensors[f"readout.{name}"])
        readout = readout.to(device=device, dtype=dtype)
    if "mean_rate" not in tensors or tensors["mean_rate"].shape != (units,):
        raise _refuse(path, f"mean_rate of {units} units", "another shape")
    mean_rate = tensors["mean_rate"].to(device=device, dtype=dtype)
    seen = _seen(path, manifest, tensors)
    return Artifact(manifest, model.to(device=device, dtype=dtype), readout, mean_rate, seen)
