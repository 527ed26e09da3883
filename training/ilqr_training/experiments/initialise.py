"""Initialisation by least squares on the observations.

From random parameters, the first hundreds of steps only search for scales: of the noise, of the
inputs, and of the speed of the state. All three can be estimated from the data. The functions here
set the readout to the principal components of the observations (so that the first latents are
observed directly, at unit variance), regress each state on the previous one, and set the scale of
the inputs to that of the residuals. Training itself is unchanged.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import logm
from scipy.signal import savgol_filter
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.files import NonNegativeInt, PositiveFloat, PositiveInt
from ilqr_vae.model.dynamics import Linear, ResidualMLP
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Gaussian

Array = NDArray[np.float64]


class StartConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``start_residual``.

    Attributes:
        window, degree: of the Savitzky-Golay filter that smooths the observations.
        gain: scale of the hidden layer's weights on observed latents. Small weights keep its units
            nearly linear, where few of them suffice for a smooth vector field.
        ridge: penalty of the regression, relative to the number of samples.
        hidden: standard deviation of z_0 in latents that are not observed.
    """

    window: PositiveInt = 9
    degree: NonNegativeInt = 4
    gain: PositiveFloat = 0.3
    ridge: PositiveFloat = 1e-5
    hidden: PositiveFloat = 0.1

    def __post_init__(self) -> None:
        if self.degree >= self.window:
            raise ValueError(f"degree: expected below window, {self.window}, got {self.degree}")


class Components(NamedTuple):
    """Principal components of observations, as a readout values = z C' + b with z white.

    Attributes:
        C: (N, r); b: (N,).
        back: (N, r); z = (values - b) back.
        rest: root mean variance of the other components; NaN if there are none.
    """

    C: Array
    b: Array
    back: Array
    rest: float


def components(values: Array, r: int) -> Components:
    """Return the first r principal components of (K, T, N) values, or N if that is less."""
    flat = values.reshape(-1, values.shape[-1])
    variance, E = np.linalg.eigh(np.atleast_2d(np.cov(flat.T)))
    variance, E = variance[::-1], E[:, ::-1]
    scale = np.sqrt(np.maximum(variance[:r], 1e-12))
    left = variance[r:]
    rest = float(np.sqrt(left.mean())) if len(left) else float("nan")
    return Components(E[:, :r] * scale, flat.mean(0), E[:, :r] / scale, rest)


def difference_noise(values: Array, order: int = 6) -> Array:
    """Return the standard deviation (N,) of white noise on top of a smooth signal.

    Repeated differences of a finely sampled smooth signal vanish, while those of white noise of
    variance s^2 have variance binom(2 order, order) s^2.

    Args:
        values: (K, T, N), more than ``order`` bins.
    """
    difference = np.diff(values, n=order, axis=1)
    return np.sqrt((difference**2).mean((0, 1)) / math.comb(2 * order, order))


def _gaussian(model: Model, group: str) -> Gaussian:
    family = model.group(group)
    if not isinstance(family, Gaussian):
        raise ShapeError(group, expected="a Gaussian group", got=family.family)
    return family


def _set(parameter: Tensor, value: NDArray[Any] | float) -> None:
    parameter.copy_(torch.as_tensor(np.ascontiguousarray(value)).to(parameter).expand_as(parameter))


@torch.no_grad()
def start_linear(model: Model, values: Array, *, group: str = "observations") -> None:
    """Initialise linear dynamics by regressing each principal component vector on the last.

    White components make ||A|| < 1, which the family requires. The inputs start along the principal
    directions of the residuals, with their standard deviations. The noise starts at the standard
    deviation of the components that are left out.

    Args:
        values: (K, T, N) with more channels N than latents.

    Raises:
        ShapeError: another dynamics or observation family, or too few channels.
    """
    dynamics, family = model.dynamics, _gaussian(model, group)
    n, m = model.n, model.m
    if not isinstance(dynamics, Linear):
        raise ShapeError("dynamics", expected="linear", got=dynamics.family)
    if values.shape[-1] <= n:
        raise ShapeError("values", expected=f"more than {n} channels", got=str(values.shape[-1]))
    seen = components(values, n)
    z = (values - seen.b) @ seen.back
    before, after = z[:, :-1].reshape(-1, n), z[:, 1:].reshape(-1, n)
    A = np.linalg.lstsq(before, after, rcond=None)[0].T
    left, gain, right = np.linalg.svd(A)
    if np.linalg.det(left) < 0:  # rotations only: flip one pair of singular vectors
        left[:, -1] *= -1
        right[-1] *= -1
    gain = np.clip(gain, 1e-3, 0.999)
    if np.linalg.det(right) < 0:  # det A < 0 cannot be expressed: drop the weakest direction
        right[-1] *= -1
        gain[-1] = 1e-3
    # exp(S - S') with S half the logarithm of a rotation is that rotation
    _set(dynamics.skew_left, 0.5 * np.real(logm(left)))
    _set(dynamics.skew_right, 0.5 * np.real(logm(right)))
    _set(dynamics.raw_gain, np.log(gain / (1 - gain)))
    variance, E = np.linalg.eigh(np.cov((after - before @ A.T).T).reshape(n, n))
    directions, strength = E[:, ::-1], np.sqrt(np.maximum(variance[::-1], 1e-12))
    used = min(n, m)
    dynamics.input.zero_()
    _set(dynamics.input[:, :used], directions[:, :used])
    _set(model.prior.log_scale[:used], np.log(strength[:used]))
    _set(family.C, seen.C)
    _set(family.b, seen.b)
    _set(family.log_scale, math.log(seen.rest))


@torch.no_grad()
def start_residual(
    model: Model, values: Array, config: StartConfig, *, group: str = "observations"
) -> None:
    """Initialise a residual network (tanh) by regressing smoothed steps on its hidden layer.

    The hidden layer's weights on the observed latents stay random; its output weights are a ridge
    regression. Latents beyond the components start nearly at rest, without effect on the others.
    Each of the first inputs moves one observed latent by its own size.

    Args:
        values: (K, T, N), smooth in time; more bins than ``config.window``.

    Raises:
        ShapeError: another dynamics or observation family, or too few bins.
    """
    dynamics, family = model.dynamics, _gaussian(model, group)
    if not isinstance(dynamics, ResidualMLP) or dynamics.activation != "tanh":
        raise ShapeError("dynamics", expected="mlp with tanh", got=dynamics.family)
    if values.shape[1] <= config.window + 1:
        raise ShapeError(
            "values", expected=f"more than {config.window + 1} bins", got=str(values.shape[1])
        )
    n, m, wide, share = model.n, model.m, dynamics.wide, dynamics.share
    seen = components(values, min(n, values.shape[-1]))
    r = seen.C.shape[1]
    smooth: Array = np.asarray(savgol_filter(values, config.window, config.degree, axis=1), float)
    z = (smooth - seen.b) @ seen.back
    half = config.window // 2  # the filter extrapolates at both ends
    before, after = z[:, half : -half - 1].reshape(-1, r), z[:, half + 1 : -half].reshape(-1, r)

    up = dynamics.up.double().numpy().copy()
    up[:, :r] *= config.gain * math.sqrt(n / r)
    up[:, r:] = 0.0
    hidden = np.tanh(before @ up[:, :r].T / math.sqrt(n) + dynamics.up_bias.double().numpy())
    X = np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
    Y = after - (1 - share) * before
    gram = X.T @ X + config.ridge * len(X) * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, X.T @ Y)
    residual = (Y - X @ weights).std(0)

    _set(dynamics.up, up)
    dynamics.down.mul_(0.1)
    _set(dynamics.down[:r], weights[:-1].T * math.sqrt(wide) / share)
    _set(dynamics.down_bias[:r], weights[-1] / share)
    dynamics.input.mul_(0.1)
    for i in range(min(r, m)):
        dynamics.input[i] = 0.0
        dynamics.input[i, i] = math.sqrt(m) / share
    _set(model.prior.log_scale, math.log(residual.max()))
    model.initial.log_scale[r:] = math.log(config.hidden)
    C = np.zeros((values.shape[-1], n))
    C[:, :r] = seen.C
    _set(family.C, C)
    _set(family.b, seen.b)
    _set(family.log_scale, np.log(difference_noise(values)))
