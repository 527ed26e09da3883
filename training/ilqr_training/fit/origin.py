"""Training from a model of other units: ``train --from``.

Dynamics, input prior and initial state of the model stay. The observation rows of units that it
knows are kept as a start; those of other units start from a fit to the behaviour
(``adaptation.units``). All rows are then trained, and the readout is fitted as usual.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from ilqr_training.adaptation.carried import CarriedUnits, carried_model, carried_spec
from ilqr_training.adaptation.units import refit
from ilqr_training.config import ModelConfig, TrainConfig
from ilqr_training.fit.crops import Prepared
from ilqr_vae.artifact import Artifact, Manifest
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import to_struct
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Counts, Observed
from ilqr_vae.progress import Progress

STEPS = 150
"""Default number of gradient steps."""
_FIRST_FIT = 6000
"""Number of last training bins for the first fit of the rows."""


def begun_from(config: TrainConfig, origin: Artifact, steps: int | None) -> TrainConfig:
    """Return the configuration with the ``[model]`` part of the model, and fewer steps.

    Raises:
        ConfigError: several members are to be trained, or the model file lacks its configuration.
    """
    if config.training.members > 1 or origin.others:
        raise ConfigError(
            "--from", expected="one model, and training.members = 1", got="an ensemble"
        )
    made = origin.manifest.config.get("model")
    if made is None:
        raise ConfigError("--from", expected="a model file that `train` wrote", got="another")
    loop = config.training
    number = min(loop.steps, STEPS) if steps is None else steps
    loop = msgspec.structs.replace(
        loop,
        steps=number,
        kl_warmup=min(loop.kl_warmup, number // 5),
        validate_every=min(loop.validate_every, -(-number // 3)),
    )
    model = to_struct(made, ModelConfig, "--from: model")
    return msgspec.structs.replace(config, model=model, training=loop)


def first_model(origin: Artifact, data: Prepared, seed: int, progress: Progress) -> Model:
    """Return the initial model, of which only the observation rows are to be trained.

    Raises:
        ConfigError: the channels differ from the model's.
        RecordingError: the bin width differs.
    """
    recording, manifest = data.recording, origin.manifest
    recording.require_bin_width(manifest.bin_width)
    recording.require_counts("--from")
    if manifest.features:
        got = ", ".join(manifest.features)
        raise ConfigError("--from", expected="a model without features", got=got)
    if "kinematics" in origin.model.groups and recording.kinematic_names != (
        names := manifest.kinematic_names
    ):
        raise ConfigError(
            "--from",
            expected=f"the model's channels {', '.join(names)}",
            got=", ".join(recording.kinematic_names) or "none",
        )
    index = {name: i for i, name in enumerate(manifest.unit_names)}
    units = CarriedUnits(np.array([index.get(name, -1) for name in recording.unit_names]))
    model = carried_model(origin, units, recording.mean_counts(*data.train))
    known = int(units.known.sum())
    progress.log(f"{known} of {recording.n_units} units are the model's; its dynamics stay")
    spikes, k = model.group("spikes"), data.standardised()
    if isinstance(spikes, Counts) and k is not None and "kinematics" in model.groups:
        part = slice(max(data.train[0], data.train[1] - _FIRST_FIT), data.train[1])
        scored = torch.as_tensor(recording.scored[part].astype(np.float64)).unsqueeze(1)
        values = torch.as_tensor(k[part])
        rows = refit(
            model,
            units.known,
            torch.as_tensor(recording.counts[part].astype(np.float64)),
            torch.as_tensor(recording.mask()[part].astype(np.float64)),
            origin.model.group("spikes").C.detach(),
            behaviour=Observed(values, scored.expand_as(values)),
            seed=seed,
            progress=progress,
        )
        with torch.no_grad():
            spikes.C.copy_(rows.w[:, :-1])
            spikes.b.copy_(rows.w[:, -1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("groups."))
    return model


def stamped(manifest: Manifest, origin: Artifact) -> Manifest:
    """Return the manifest of the trained model, with its origin."""
    return msgspec.structs.replace(
        manifest,
        model=carried_spec(origin, len(manifest.unit_names)),
        provenance=manifest.provenance | {"trained_from": origin.manifest.model_id},
    )
