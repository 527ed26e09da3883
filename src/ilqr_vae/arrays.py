"""What a trained model takes and answers, as numpy arrays.

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
"""Most spikes of one unit in one bin, here, in recordings and on the wire."""


def mixture(means: Sequence[Array], stds: Sequence[Array]) -> tuple[Array, Array]:
    """Mean and standard deviation of an equal mixture: the mean variance, and the variance of the
    means."""
    each = np.stack(means)
    mean = each.mean(0)
    variance = (np.stack(stds) ** 2).mean(0) + ((each - mean) ** 2).mean(0)
    return mean, np.sqrt(variance)


class _Shown:
    """Shows the shapes of its arrays."""

    def __repr__(self) -> str:
        arrays = ((f.name, getattr(self, f.name)) for f in fields(self) if f.repr)  # pyright: ignore[reportArgumentType]
        shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays if isinstance(x, np.ndarray))
        return f"{type(self).__name__}({shapes})"


@dataclass(frozen=True, repr=False)
class Inference(_Shown):
    """The posterior of one trial, or of B trials of one length (a leading axis B on every array).

    Attributes:
        latents: (T, n), mean of the latent state at each bin, all bins of the trial considered.
        covariance: (T, n, n), of the latents.
        inputs, inputs_std: (T, m), the inferred inputs.
        rates, rates_std: (T, N), expected spikes per bin at the mean latents.
        kinematics, kinematics_std: (T, D), in the model's ``kinematic_units``; D = 0 where it
            decodes none. The standard deviations are calibrated for causal decodes.
        initial: (n,), the state before the first bin.
        status: why the solve ended, e.g. "converged" (``ilqr_vae.inference.problem.Status``); B of
            them for B trials.
        counts, mask: (T, N), what was conditioned on.
        members: of an ensemble each member's own posterior, the first one's being this one's
            latents; of one model, none.
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
        """Whether there is an axis of trials."""
        return self.latents.ndim == 3

    @staticmethod
    def of_members(members: Sequence[Inference]) -> Inference:
        """The first member's posterior, with the rates and kinematics of all."""
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
        """Some of the bins of every trial."""
        axis = (slice(None),) * self.batched
        return self._changed(
            lambda name, x: x if name in ("initial", "status") else x[(*axis, which)],
            lambda member: member.bins(which),
        )

    def trial(self, i: int) -> Inference:
        """One trial of a batch."""
        return self._changed(
            lambda name, x: str(x[i]) if name == "status" else x[i],
            lambda member: member.trial(i),
        )

    def batch(self) -> Inference:
        """As a batch, of one trial where it is none."""
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
    """K draws from the posterior of a trial; of B trials, shapes begin (K, B, ...).

    Attributes:
        latents: (K, T, n).
        inputs: (K, T, m).
        rates: (K, T, N), expected spikes per bin.
        counts: (K, T, N), spikes drawn at those rates, of every unit, observed or not.
    """

    latents: Array
    inputs: Array
    rates: Array
    counts: Array


@dataclass(frozen=True, repr=False)
class StreamAnswer(_Shown):
    """The causal estimate after one bin, as the service answers it.

    Attributes:
        index: of the bin, from zero.
        latents: (n,); covariance: (n, n).
        rates: (N,), expected spikes per bin.
        kinematics, kinematics_std: (D,), in the model's ``kinematic_units``.
        bits: log-likelihood of the bin as predicted before it came, relative to the mean rates of
            the training data, in bits.
        iterations: of the solve.
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
    ndim: int = 0,
    field: str = "counts",
) -> tuple[Array, Array]:
    """Counts and their mask as float64 of one shape; counts are zero where the mask is.

    Args:
        mask: of the counts' shape or without the units' axis; nonzero where observed, None for
            everywhere.
        units: names of the last axis.
        whole: whether counts must be whole numbers from 0 to ``MAX_COUNT``; else finite ones.
        ndim: the axes there must be; else two (bins, units) or three (trials, bins, units).
        field: what to call the counts in an error.

    Raises:
        ShapeError: a wrong shape or dtype, or counts that cannot be.
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
    y = np.where(seen > 0, y, 0.0)
    bad = ~((y >= 0) & (y <= MAX_COUNT) & (y == np.round(y))) if whole else ~np.isfinite(y)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        wanted = f"whole numbers from 0 to {MAX_COUNT}" if whole else "finite numbers"
        raise ShapeError(
            field,
            expected=f"{wanted}, or a mask of zero there",
            got=f"{y[at]:g} of unit {units[at[-1]]!r} at {at}",
        )
    return y, seen


def _real(values: ArrayLike, field: str) -> Array:
    """As float64. Raises ShapeError: not an array of numbers."""
    try:
        made = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(field, expected="an array of numbers", got=str(error)) from error
    if made.dtype.kind not in "biuf":
        raise ShapeError(field, expected="an array of numbers", got=f"dtype {made.dtype}")
    return made.astype(np.float64)
