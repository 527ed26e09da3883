"""Inputs and results of a trained model, as numpy arrays.

Notation: T bins, N units, n latents, m inputs, D kinematic channels, B trials. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilqr_vae.errors import ShapeError

Array = NDArray[np.float64]

MAX_COUNT = 65_535
"""Largest count of a unit in a bin, in the library, in recordings and in messages."""


def mixture(means: Sequence[Array], stds: Sequence[Array]) -> tuple[Array, Array]:
    """Return mean and standard deviation of an equal mixture.

    The variance is the mean variance plus the variance of the means.
    """
    each = np.stack(means)
    mean = each.mean(0)
    variance = (np.stack(stds) ** 2).mean(0) + ((each - mean) ** 2).mean(0)
    return mean, np.sqrt(variance)


class _Shown:
    """Base class with a repr that shows the shapes of arrays."""

    def __repr__(self) -> str:
        arrays = ((f.name, getattr(self, f.name)) for f in fields(self) if f.repr)  # pyright: ignore[reportArgumentType]
        shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays if isinstance(x, np.ndarray))
        return f"{type(self).__name__}({shapes})"


@dataclass(frozen=True, repr=False)
class Inference(_Shown):
    """The posterior of a trial, or of B trials of the same length (all arrays have an axis B
    first).

    Attributes:
        latents: (T, n), mean of the latent state at each bin given the whole trial.
        covariance: (T, n, n), covariance of the latents.
        inputs, inputs_std: (T, m), the inferred inputs.
        rates, rates_std: (T, N), expected spikes per bin at the mean latents.
        kinematics, kinematics_std: (T, D), in the model's ``kinematic_units``; D = 0 if it decodes
            none. The standard deviations are calibrated for causal decodes.
        initial: (n,), state before the first bin.
        status: why the solve ended, e.g. "converged" (``ilqr_vae.inference.problem.Status``); B of
            them for B trials.
        counts, mask: (T, N), the observations.
        members: posteriors of the members of an ensemble, of which the first supplies the latents
            here; empty for a single model.
    """

    latents: Array
    covariance: Array
    inputs: Array
    inputs_std: Array
    rates: Array
    rates_std: Array
    kinematics: Array
    kinematics_std: Array
    initial: Array
    status: Any
    counts: Array = field(repr=False)
    mask: Array = field(repr=False)
    members: tuple[Inference, ...] = field(default=(), repr=False)

    @property
    def latents_std(self) -> Array:
        """(T, n), standard deviation of each latent."""
        return np.sqrt(np.diagonal(self.covariance, axis1=-2, axis2=-1))

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def batched(self) -> bool:
        """Whether the arrays have an axis of trials."""
        return self.latents.ndim == 3

    @staticmethod
    def of_members(members: Sequence[Inference]) -> Inference:
        """Combine members: the posterior of the first, with rates and kinematics of all."""
        rates, rates_std = mixture([r.rates for r in members], [r.rates_std for r in members])
        mean, std = mixture([r.kinematics for r in members], [r.kinematics_std for r in members])
        return replace(
            members[0],
            rates=rates,
            rates_std=rates_std,
            kinematics=mean,
            kinematics_std=std,
            members=tuple(members),
        )

    def bins(self, which: slice) -> Inference:
        """Return some of the bins of every trial."""
        axis = (slice(None),) * self.batched
        return self._changed(
            lambda name, x: x if name in ("initial", "status") else x[(*axis, which)],
            lambda member: member.bins(which),
        )

    def trial(self, i: int) -> Inference:
        """Return one trial of a batch."""
        return self._changed(
            lambda name, x: str(x[i]) if name == "status" else x[i],
            lambda member: member.trial(i),
        )

    def batch(self) -> Inference:
        """Return the posterior as a batch, possibly of one trial."""
        if self.batched:
            return self
        return self._changed(lambda _, x: np.asarray(x)[None], Inference.batch)

    def _changed(
        self, change: Callable[[str, Any], Any], of_member: Callable[[Inference], Inference]
    ) -> Inference:
        names = [f.name for f in fields(self) if f.name != "members"]
        changed = {name: change(name, getattr(self, name)) for name in names}
        return replace(self, **changed, members=tuple(map(of_member, self.members)))


@dataclass(frozen=True, repr=False)
class Samples(_Shown):
    """K draws from the posterior of a trial; for B trials, shapes are (K, B, ...).

    Attributes:
        latents: (K, T, n).
        inputs: (K, T, m).
        rates: (K, T, N), expected spikes per bin.
        counts: (K, T, N), counts drawn at these rates for all units, observed or not.
    """

    latents: Array
    inputs: Array
    rates: Array
    counts: Array


@dataclass(frozen=True, repr=False)
class StreamAnswer(_Shown):
    """The causal estimate after one bin, as in an answer of the service.

    Attributes:
        index: index of the bin, from zero.
        latents: (n,); covariance: (n, n).
        rates: (N,), expected spikes per bin.
        kinematics, kinematics_std: (D,), in the model's ``kinematic_units``.
        bits: log-likelihood in bits of the bin under its one-step-ahead prediction, relative to the
            mean rates of the training data.
        iterations: number of iterations of the solve.
        status: why the solve ended.
    """

    index: int
    latents: Array
    covariance: Array
    rates: Array
    kinematics: Array
    kinematics_std: Array
    bits: float
    iterations: int
    status: str

    @property
    def latents_std(self) -> Array:
        """(n,)."""
        return np.sqrt(np.diagonal(self.covariance))


def checked(
    counts: ArrayLike,
    mask: ArrayLike | None,
    units: tuple[str, ...],
    *,
    whole: bool,
    features: int = 0,
    ndim: int = 0,
    field: str = "counts",
) -> tuple[Array, Array]:
    """Return counts and their mask as float64 of one shape; counts are zero where masked.

    Args:
        mask: nonzero where observed, with the shape of the counts or without the axis of units;
            None for all observed.
        units: names of the units along the last axis.
        whole: whether counts must be integers from 0 to ``MAX_COUNT``; if false, they must be
            finite.
        features: number of units, the last ones, that are finite numbers in any case; NaN if not
            observed.
        ndim: required number of axes; default: two (bins, units) or three (trials, bins, units).
        field: name of the counts in errors.

    Raises:
        ShapeError: the shape or dtype is wrong, or a count is impossible.
    """
    y = _real(counts, field)
    leads = {1: ("",), 2: ("bins, ",)}.get(ndim, ("bins, ", "trials, bins, "))
    if y.ndim not in ({ndim} if ndim else {2, 3}) or y.shape[-1] != len(units) or 0 in y.shape:
        shapes = " or ".join(f"({lead}{len(units)})" for lead in leads)
        named = ", ".join(units[:3]) + (", ..." if len(units) > 3 else "")
        raise ShapeError(
            field, expected=f"{shapes}, the model's units being {named}", got=f"shape {y.shape}"
        )
    seen = np.ones(y.shape)
    if mask is not None:
        m = _real(mask, "mask")
        m = m[..., None] if m.ndim == y.ndim - 1 and m.ndim else m
        if m.shape not in (y.shape, (*y.shape[:-1], 1)):
            expected = f"shape {y.shape}" + (f" or {y.shape[:-1]}" if y.ndim > 1 else "")
            raise ShapeError("mask", expected=expected, got=f"shape {np.shape(mask)}")
        seen = seen * (m != 0)
    continuous = np.arange(len(units)) >= (len(units) - features if whole else 0)
    if features:
        seen = seen * ~(continuous & np.isnan(y))
    y = np.where(seen > 0, y, 0.0)
    countable = (y >= 0) & (y <= MAX_COUNT) & (y == np.round(y))
    bad = ~np.where(continuous, np.isfinite(y), countable)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        counted = f"whole numbers from 0 to {MAX_COUNT}"
        wanted = "finite numbers" if continuous[at[-1]] else counted
        raise ShapeError(
            field,
            expected=f"{wanted}, or a mask of zero there",
            got=f"{y[at]:g} of unit {units[at[-1]]!r} at {at}",
        )
    return y, seen


def _real(values: ArrayLike, field: str) -> Array:
    """Convert to float64. Raises ShapeError if it is not an array of numbers."""
    try:
        made = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(field, expected="an array of numbers", got=str(error)) from error
    if made.dtype.kind not in "biuf":
        raise ShapeError(field, expected="an array of numbers", got=f"dtype {made.dtype}")
    return made.astype(np.float64)
