"""The training configuration: a TOML file holds overrides only; unknown keys are refused."""

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
    """The ``[model]`` part; beside these keys, those of ``DynamicsOptions``.

    Attributes:
        latents, inputs: n and m.
        dynamics: family (``ilqr_vae.model.dynamics``).
        prior: of the inputs.
        nu: degrees of freedom at which the Student prior starts.
        initial_mean: learn the mean of z_0; else it is zero, as in the paper.
        likelihood: of the counts. With "gaussian" and linear dynamics the estimator is the Kalman
            filter.
        link: of Poisson counts.
        gain, floor: of Poisson counts: rate = gain (link(C z + b) + floor), with a learned gain for
            each unit if true; the floor is in counts per bin at a gain of one.
        kinematics: let the kinematics shape the latents, as a second group of observations; else
            they are only read out.
    """

    latents: PositiveInt = 20
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
        steps: gradient steps at most.
        batch, chunk: random crops per step, bins per crop.
        learning_rate, decay: Adam at learning_rate / sqrt(1 + step / decay).
        clip: largest gradient norm.
        kl_warmup: steps over which the KL's weight grows to one.
        kinematic_weight: of the kinematic term of the bound.
        posterior: Kronecker (the paper's) or the per-trial Laplace.
        exact_gradient: implicit gradient with the dynamics' curvature; else Gauss-Newton.
        iterations, tolerance: of the iLQR solves while training.
        validate_every: steps between causal validations (zero: only at the end).
        patience: validations without a better score before stopping.
        seed: of everything drawn.
        members: models trained from different seeds, which one model file holds and which are
            streamed as one: their mean is decoded. More decode better, and cost as many times the
            training and the solve of one.
        dtype: of training; the streaming estimator is float64 in any case.
        device: of the gradient steps: cpu, cuda, cuda:N or auto (cuda where torch sees one).
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
        lags: how many earlier estimates of the window it reads beside the newest, as far as the
            estimator's horizon holds them.
        residuals: bins whose unexplained spikes it may read, as far as the horizon holds them; zero
            for none.
        hidden: units of each hidden layer it may have; zero for none.
        members: hidden layers averaged.
        steps: gradient steps of the hidden layers' training.
        dropout: share of hidden units left out in it; of features and of units, half of that. Of
            the recurrent layer's inputs and units as well.
        recurrent: units of a layer that may run over the last ``lags`` bins' counts; zero for none.
        recurrent_steps: gradient steps of its training at most.
        later: bins after which it may decode a bin once more, as far as ``lags``; zero for none.
        lost: shares of the bins that are left out in further passes over the training part, from
            which all but the penalties and shares are learnt as well.
        alphas: ridge strengths tried on the validation part, for latents and unexplained spikes.
        classes: whether to fit a discrete output too: the probability of each condition of the
            trials (``data.trials.condition``) from the latents, calibrated on the validation part.
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
        """With no more lags and residuals than the horizon holds."""
        lags = min(self.lags, horizon)
        return msgspec.structs.replace(
            self,
            lags=lags,
            residuals=min(self.residuals, horizon),
            later=min(self.later, lags),
        )

    @property
    def shape(self) -> ReadoutShape:
        """The most it may read."""
        return ReadoutShape(
            lags=self.lags,
            residuals=self.residuals,
            hidden=self.hidden,
            recurrent=self.recurrent if self.lags else 0,
        )


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides a training run, beside the recording itself."""

    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)
    model: ModelConfig = msgspec.field(default_factory=ModelConfig)
    training: LoopConfig = msgspec.field(default_factory=LoopConfig)
    estimator: HorizonConfig = msgspec.field(default_factory=HorizonConfig)
    readout: ReadoutConfig = msgspec.field(default_factory=ReadoutConfig)


def check(config: TrainConfig) -> TrainConfig:
    """The configuration, its ranges checked. Raises ConfigError naming the key."""
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
    """The same, learning from that share of the recording (``SplitSpec.fraction``)."""
    split = msgspec.structs.replace(config.data.split, fraction=fraction)
    data = msgspec.structs.replace(config.data, split=split)
    return msgspec.structs.replace(config, data=data)


def overridden(
    config: TrainConfig, *, fraction: float | None = None, **given: int | str | None
) -> TrainConfig:
    """A configuration with ``[training]`` keys replaced where one is given. Raises ConfigError."""
    changes = {k: v for k, v in given.items() if v is not None}
    loop = msgspec.structs.replace(config.training, **changes)
    changed = msgspec.structs.replace(config, training=loop)
    return check(changed if fraction is None else with_fraction(changed, fraction))


def load_config(path: str | Path) -> TrainConfig:
    """Read a config. Raises ConfigError: no file, not TOML, unknown key, wrong type or value."""
    return check(read_toml(Path(path), TrainConfig))
