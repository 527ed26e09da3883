"""The training configuration: a TOML file holds overrides only; unknown keys are refused."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from ilqr_vae.errors import ConfigError
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
        prior: of the inputs; nu: degrees of freedom at which the Student prior starts.
        initial_mean: learn the mean of z_0; else it is zero, as in the paper.
        likelihood: of the counts. With "gaussian" and linear dynamics the estimator is the Kalman
            filter.
        link: of Poisson counts.
        gain, floor: of Poisson counts: rate = gain (link(C z + b) + floor), with a learned gain for
            each unit if true; the floor is in counts per bin at a gain of one.
        kinematics: let the kinematics shape the latents, as a second group of observations; else
            they are only read out.
    """

    latents: int = 20
    inputs: int = 8
    dynamics: Literal["mgu2", "mgu", "rnn", "mlp", "linear"] = "mgu2"
    prior: Literal["gaussian", "student"] = "gaussian"
    nu: float = 5.0
    initial_mean: bool = True
    likelihood: Literal["poisson", "gaussian"] = "poisson"
    link: Literal["exp", "softplus"] = "exp"
    gain: bool = False
    floor: float = 0.0
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
        dtype: of training; the streaming estimator is float64 in any case.
        device: of the gradient steps: cpu, cuda, cuda:N or auto (cuda where torch sees one).
    """

    steps: int = 1000
    batch: int = 32
    chunk: int = 40
    learning_rate: float = 0.01
    decay: float = 150.0
    clip: float = 5.0
    kl_warmup: int = 100
    kinematic_weight: float = 1.0
    posterior: Literal["kronecker", "laplace"] = "kronecker"
    exact_gradient: bool = False
    iterations: int = 8
    tolerance: float = 1e-4
    validate_every: int = 100
    patience: int = 4
    seed: int = 0
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
        lost: shares of the bins that are left out in further passes over the training part, from
            which all but the penalties and shares are learnt as well.
        alphas: ridge strengths tried on the validation part, for latents and unexplained spikes.
    """

    lags: int = 9
    residuals: int = 4
    hidden: int = 128
    members: int = 4
    steps: int = 2000
    dropout: float = 0.4
    recurrent: int = 128
    recurrent_steps: int = 1500
    lost: tuple[float, ...] = (0.2, 0.3)
    alphas: tuple[float, ...] = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)

    def within(self, horizon: int) -> ReadoutConfig:
        """With no more lags and residuals than the horizon holds."""
        return msgspec.structs.replace(
            self, lags=min(self.lags, horizon), residuals=min(self.residuals, horizon)
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


def _require(field: str, value: float | str, expected: str, ok: bool) -> None:
    if not ok:
        raise ConfigError(field, expected=expected, got=str(value))


def check(config: TrainConfig) -> TrainConfig:
    """Values a type cannot rule out. Raises ConfigError naming the field."""
    for name in ("latents", "inputs"):
        value = getattr(config.model, name)
        _require(f"model.{name}", value, "at least 1", value >= 1)
    loop = config.training
    for name in ("steps", "batch", "chunk", "iterations"):
        value = getattr(loop, name)
        _require(f"training.{name}", value, "at least 1", value >= 1)
    for name in ("learning_rate", "decay", "clip", "tolerance"):
        value = getattr(loop, name)
        _require(f"training.{name}", value, "above zero", 0 < value < math.inf)
    for name in ("kinematic_weight", "kl_warmup", "validate_every", "patience", "seed"):
        value = getattr(loop, name)
        _require(f"training.{name}", value, "zero or more", 0 <= value < math.inf)
    _require("training.seed", loop.seed, "below 2^63", loop.seed < 2**63)
    model, tolerance = config.model, config.estimator.tolerance
    _require(
        "model.forget_bias", model.forget_bias, "a finite number", math.isfinite(model.forget_bias)
    )
    known = f"one of {', '.join(ACTIVATIONS)}"
    _require("model.activation", repr(model.activation), known, model.activation in ACTIVATIONS)
    _require("model.expansion", model.expansion, "at least 1", model.expansion >= 1)
    _require("model.step", model.step, "above 0, at most 1", 0 < model.step <= 1)
    _require("model.nu", model.nu, "above 2", 2 < model.nu < math.inf)
    _require("model.floor", model.floor, "zero or more", 0 <= model.floor < math.inf)
    plain = not (model.gain or model.floor) and model.link == "exp"
    poisson = plain or model.likelihood == "poisson"
    _require("model.likelihood", "gaussian", "poisson, with a gain, a floor or a link", poisson)
    _require("estimator.tolerance", tolerance, "zero or more", 0 <= tolerance < math.inf)
    for name in ("horizon", "iterations"):
        value = getattr(config.estimator, name)
        _require(f"estimator.{name}", value, "at least 1", value >= 1)
    readout = config.readout
    for name in ("lags", "residuals", "hidden", "recurrent"):
        value = getattr(readout, name)
        _require(f"readout.{name}", value, "zero or more", value >= 0)
    for name in ("members", "steps", "recurrent_steps"):
        value = getattr(readout, name)
        _require(f"readout.{name}", value, "at least 1", value >= 1)
    _require("readout.dropout", readout.dropout, "0 to below 1", 0 <= readout.dropout < 1)
    shares = all(0 < share < 1 for share in readout.lost)
    _require("readout.lost", str(readout.lost), "shares between 0 and 1", shares)
    _require(
        "readout.alphas",
        str(config.readout.alphas),
        "at least one, all above zero",
        bool(config.readout.alphas) and all(0 < a < math.inf for a in config.readout.alphas),
    )
    width, rate = config.data.bin_width, config.data.min_rate
    _require("data.bin_width", width, "above zero", 0 < width < math.inf)
    _require("data.min_rate", rate, "zero or more", 0 <= rate < math.inf)
    window = config.data.trials.window
    _require("data.lag", config.data.lag, "finite seconds", math.isfinite(config.data.lag))
    _require("data.trials.window", str(window), "finite", all(map(math.isfinite, window)))
    rate = config.data.nwb.rate
    _require("data.nwb.rate", rate, "zero or more", 0 <= rate < math.inf)
    split = config.data.split
    _require(
        "data.split",
        split.train,
        f"0 < train < validation <= 1, with validation {split.validation}",
        0 < split.train < split.validation <= 1,
    )
    _require("data.split.fraction", split.fraction, "above 0, at most 1", 0 < split.fraction <= 1)
    return config


def with_fraction(config: TrainConfig, fraction: float) -> TrainConfig:
    """The same, learning from that share of the recording (``SplitSpec.fraction``)."""
    split = msgspec.structs.replace(config.data.split, fraction=fraction)
    data = msgspec.structs.replace(config.data, split=split)
    return msgspec.structs.replace(config, data=data)


def load_config(path: str | Path) -> TrainConfig:
    """Read a config. Raises ConfigError: no file, not TOML, unknown key, wrong type or value."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"config {path.name}", expected="a readable TOML file", got=str(error)
        ) from error
    try:
        return check(msgspec.convert(raw, TrainConfig))
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"config {path.name}", expected="known keys of the right types", got=str(error)
        ) from error
