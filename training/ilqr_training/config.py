"""The training configuration: a TOML file overrides the defaults; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ilqr_vae.errors import ConfigError
from ilqr_vae.files import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenShare,
    PositiveFloat,
    PositiveInt,
    ShareBelowOne,
    naming,
    read_toml,
    to_struct,
    unit,
)
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.model.dynamics.base import ACTIVATIONS
from ilqr_vae.model.readout import ReadoutShape
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig


class ModelConfig(DynamicsOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[model]`` part; it also takes the keys of ``DynamicsOptions``.

    Attributes:
        latents, inputs: number of latents n and of inputs m.
        dynamics: family of the dynamics (``ilqr_vae.model.dynamics``).
        prior: prior of the inputs.
        nu: initial degrees of freedom of the Student prior.
        initial_mean: whether to learn the mean of z_0; if false it is zero, as in the paper.
        likelihood: likelihood of the counts. With "gaussian" and linear dynamics the estimator is
            the Kalman filter.
        link: link function of Poisson counts.
        gain, floor: of Poisson counts: rate = gain (link(C z + b) + floor), with a learned gain for
            each unit if ``gain`` is true; the floor is in counts per bin at a gain of one.
        kinematics: whether kinematics are a second group of observations that shapes the latents;
            if false they are only decoded.
    """

    latents: PositiveInt = 32
    inputs: PositiveInt = 8
    dynamics: Literal["mgu2", "mgu", "rnn", "mlp", "linear"] = "mgu2"
    prior: Literal["gaussian", "student"] = "gaussian"
    nu: Annotated[float, msgspec.Meta(gt=2, le=1e300)] = 5.0
    initial_mean: bool = True
    likelihood: Literal["poisson", "gaussian"] = "poisson"
    link: Literal["exp", "softplus"] = "exp"
    gain: bool = False
    floor: Annotated[NonNegativeFloat, unit("spikes/bin")] = 0.0
    kinematics: bool = True

    @property
    def options(self) -> DynamicsOptions:
        return DynamicsOptions(**{k: getattr(self, k) for k in DynamicsOptions.__struct_fields__})


class LoopConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[training]`` part.

    Attributes:
        steps: largest number of gradient steps.
        batch, chunk: random crops per step, and bins per crop.
        learning_rate, decay: Adam with learning rate learning_rate / sqrt(1 + step / decay).
        clip: largest gradient norm.
        kl_warmup: steps over which the KL's weight grows to one.
        kinematic_weight: weight of the kinematic term of the bound.
        posterior: Kronecker (the paper's) or per-trial Laplace.
        exact_gradient: whether the implicit gradient includes the curvature of the dynamics; if
            false it is Gauss-Newton.
        iterations, tolerance: limits of the iLQR solves during training.
        validate_every: steps between causal validations; zero validates only at the end.
        patience: number of validations without a better score before stopping.
        seed: seed of all random numbers.
        members: number of models trained from different seeds and saved in one file, whose mean is
            decoded. More members decode better, at proportional cost of training and streaming.
        dtype: floating-point type of training; the streaming estimator is always float64.
        device: device of the gradient steps: cpu, cuda, cuda:N or auto (cuda if available).
    """

    steps: PositiveInt = 1000
    batch: PositiveInt = 32
    chunk: Annotated[PositiveInt, unit("bins")] = 40
    learning_rate: PositiveFloat = 0.01
    decay: Annotated[PositiveFloat, unit("steps")] = 150.0
    clip: PositiveFloat = 5.0
    kl_warmup: Annotated[NonNegativeInt, unit("steps")] = 100
    kinematic_weight: NonNegativeFloat = 1.0
    posterior: Literal["kronecker", "laplace"] = "kronecker"
    exact_gradient: bool = False
    iterations: PositiveInt = 8
    tolerance: PositiveFloat = 1e-4
    validate_every: Annotated[NonNegativeInt, unit("steps")] = 100
    patience: NonNegativeInt = 4
    seed: NonNegativeInt = 0
    members: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"


class ReadoutConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[readout]`` part: from causal latents to kinematics, fitted on the training part.

    Attributes:
        lags: number of earlier estimates of the window to read beside the newest, at most as many
            as the estimator's horizon holds.
        residuals: number of bins whose residual spikes may be read, at most as many as the horizon
            holds; zero for none.
        hidden: units of each hidden layer; zero for none.
        members: number of hidden layers that are averaged.
        steps: gradient steps of the hidden layers.
        dropout: dropout of hidden units, and half of it of features and of units; also of the
            recurrent layer's inputs and units.
        recurrent: units of a recurrent layer over the counts of the last ``lags`` bins; zero for
            none.
        recurrent_steps: largest number of gradient steps of the recurrent layer.
        later: number of later bins after which a bin may be decoded again, at most ``lags``; zero
            for none.
        lost: shares of bins that are dropped in further passes over the training part, on which all
            but the penalties and shares are also fitted.
        alphas: ridge penalties to try on the validation part, for latents and residual spikes.
        classes: whether to also fit a discrete output: the probability of each condition of the
            trials (``data.trials.condition``) given the latents, calibrated on the validation part.
    """

    lags: Annotated[NonNegativeInt, unit("bins")] = 9
    residuals: Annotated[NonNegativeInt, unit("bins")] = 4
    hidden: NonNegativeInt = 128
    members: PositiveInt = 4
    steps: PositiveInt = 2000
    dropout: ShareBelowOne = 0.4
    recurrent: NonNegativeInt = 128
    recurrent_steps: PositiveInt = 1500
    later: Annotated[NonNegativeInt, unit("bins")] = 3
    lost: tuple[OpenShare, ...] = (0.2, 0.3)
    alphas: Annotated[tuple[PositiveFloat, ...], msgspec.Meta(min_length=1)] = (
        1e-1,
        1.0,
        1e1,
        1e2,
        1e3,
        1e4,
        1e5,
    )
    classes: bool = False

    def within(self, horizon: int) -> ReadoutConfig:
        """Return a copy with at most as many lags and residuals as the horizon holds."""
        lags = min(self.lags, horizon)
        return msgspec.structs.replace(
            self,
            lags=lags,
            residuals=min(self.residuals, horizon),
            later=min(self.later, lags),
        )

    @property
    def shape(self) -> ReadoutShape:
        """Shape of the largest readout."""
        return ReadoutShape(
            lags=self.lags,
            residuals=self.residuals,
            hidden=self.hidden,
            recurrent=self.recurrent if self.lags else 0,
        )


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of a training run."""

    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)
    model: ModelConfig = msgspec.field(default_factory=ModelConfig)
    training: LoopConfig = msgspec.field(default_factory=LoopConfig)
    estimator: HorizonConfig = msgspec.field(default_factory=HorizonConfig)
    readout: ReadoutConfig = msgspec.field(default_factory=ReadoutConfig)


def check(config: TrainConfig) -> TrainConfig:
    """Return the configuration after range checks. Raises ConfigError naming an invalid key."""
    config = to_struct(config, TrainConfig, "config")
    model = config.model
    if model.activation not in ACTIVATIONS:
        known = f"one of {', '.join(ACTIVATIONS)}"
        raise ConfigError("model.activation", expected=known, got=repr(model.activation))
    if model.likelihood != "poisson" and (model.gain or model.floor or model.link != "exp"):
        raise ConfigError(
            "model.likelihood", expected="poisson, with a gain, a floor or a link", got="gaussian"
        )
    split = config.data.split
    if split.train >= split.validation:
        raise ConfigError(
            "data.split.train",
            expected=f"less than data.split.validation, {split.validation:g}",
            got=f"{split.train:g}",
        )
    return config


def with_fraction(config: TrainConfig, fraction: float) -> TrainConfig:
    """Return a copy that trains on this share of the recording (``SplitSpec.fraction``)."""
    split = msgspec.structs.replace(config.data.split, fraction=fraction)
    data = msgspec.structs.replace(config.data, split=split)
    return msgspec.structs.replace(config, data=data)


def overridden(
    config: TrainConfig, *, fraction: float | None = None, **given: int | str | None
) -> TrainConfig:
    """Return a copy with the given ``[training]`` keys replaced. Raises ConfigError."""
    changes = {k: v for k, v in given.items() if v is not None}
    loop = msgspec.structs.replace(config.training, **changes)
    changed = msgspec.structs.replace(config, training=loop)
    return check(changed if fraction is None else with_fraction(changed, fraction))


def load_config(path: str | Path) -> TrainConfig:
    """Read a TOML file. Raises ConfigError if it is missing or invalid."""
    with naming(path):
        return check(read_toml(Path(path), TrainConfig))
