"""The specification of a model, from which it is built before its tensors are loaded."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec

from ilqr_vae.errors import ArtifactError
from ilqr_vae.model.dynamics import FAMILIES, DynamicsOptions
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import (
    LIKELIHOODS,
    Counts,
    CountsAndFeatures,
    Gaussian,
    Likelihood,
    Poisson,
)
from ilqr_vae.model.priors import INPUT_PRIORS, InitialPrior, InputPrior, StudentPrior


class GroupSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One observation group.

    Attributes:
        family: name of the likelihood.
        channels: number of channels, features included.
        log_rate_max: for poisson: where the exponential link becomes linear.
        gain, floor: for the Poisson families, see ``likelihoods.Counts``.
        features: number of channels, the last ones, that are continuous beside counts; absent for
            counts alone (``likelihoods.CountsAndFeatures``).
    """

    family: str
    channels: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    log_rate_max: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 6.0
    gain: bool = False
    floor: float = 0.0
    features: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType = msgspec.UNSET


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Families, sizes and options of a model.

    Attributes:
        dynamics, prior: family names.
        latents, inputs: n and m.
        groups: the observation groups.
        options: choices within the dynamics family.
        nu: initial degrees of freedom of a Student prior.
        initial_mean: whether the mean of z_0 is learned; if false it is zero, as with surrogate
            bins.
    """

    dynamics: str
    prior: str = "gaussian"
    latents: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    inputs: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    groups: dict[str, GroupSpec]
    options: DynamicsOptions = DynamicsOptions()
    nu: float = 5.0
    initial_mean: bool = True


def build(spec: ModelSpec) -> Model:
    """Build a model with new parameters. Raises ArtifactError for an unknown family."""
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
        features = g.features or 0
        if features and not (issubclass(kind, Counts) and features < g.channels):
            field, expected = f"model.groups.{name}.features", f"below {g.channels}, beside counts"
            raise ArtifactError(field, expected=expected, got=f"{features} beside {g.family}")
        made = kind(spec.latents, g.channels - features, **given)
        if features and isinstance(made, Counts):
            made = CountsAndFeatures(made, Gaussian(spec.latents, features))
        groups[name] = made
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
