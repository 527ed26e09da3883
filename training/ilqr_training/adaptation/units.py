"""The E-step and the evidence: which units still fit, and new rows for those that do not.

The latents for unit i are inferred from other units, in folds, so that no unit predicts itself.
With draws z of these latents, and the counts y of the unit,

    old_i   = max_c sum_t log p(y_ti | C_i z_t + b_i + c)       the row as it was, at another level
    none_i  = max_c sum_t log p(y_ti | c)                       a constant rate

A unit is an *anchor* if old_i > none_i. Latents are then inferred from the anchors only, and
anchors are chosen again; three rounds suffice. If behaviour is known, latents are also inferred
from it. Anchors fix the latent frame: their C is kept. Its level changes if that predicts better by
``_SURE`` nats. C is refitted near its old value only if that predicts the other half of the bins
better by ``_MOVED`` nats more. A unit is no longer an anchor if a row fitted from scratch predicts
better by ``_MOVED`` nats and the old row has less than ``_SHARE`` of its evidence: it is then
another unit with similar tuning. The rows of all other units are fitted under a prior of the size
of the model's rows. They are used if they predict the other half of the bins better than a constant
rate does; latents are then inferred with them too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ilqr_training.adaptation.rows import RowPrior, fit_rows
from ilqr_vae.inference import prediction
from ilqr_vae.inference.problem import SolverConfig
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Counts, Observed
from ilqr_vae.progress import SILENT, Progress

_SOLVER = SolverConfig(iterations=30, tolerance=1e-4)
_CHUNK = 40
_DRAWS = 4
_DRAWN = 8000  # draws in all: long parts get fewer per bin
_FOLDS = 4
_JUDGED = 1200  # latest bins on which units are compared with their old rows
_ROUNDS = 3
_SURE = 3.0  # a new row must beat the row it replaces by this many nats
_MOVED = 10.0  # another C must beat the old one by this many nats
_SHARE = 0.5  # least evidence of an anchor's old row, as a share of that of the best row
_NEAR = 0.15  # expected change of an anchor's row, as a share of the spread of the rows
_LEVEL = 0.5  # expected change of a log rate
_ANY_LEVEL = 3.0
_LEVEL_CLOSE = 1e-4


class UnitVerdict(Enum):
    """What was done with a unit; the values are shown to users."""

    KEPT = "row kept"
    MOVED = "row fitted again, near the old one"
    LEARNT = "row learnt anew"
    UNUSED = "not predicted by the others: not used"


@dataclass(frozen=True)
class Rows:
    """Rows of N units.

    Attributes:
        w: (N, n + 1), C and b.
        verdicts: one per unit.
        latents: (T, n), a draw from their posterior.
    """

    w: Float[Tensor, "N F"]
    verdicts: tuple[UnitVerdict, ...]
    latents: Float[Tensor, "T n"]

    @property
    def used(self) -> Bool[Tensor, " N"]:
        """Units that the latents predict."""
        return torch.tensor([v is not UnitVerdict.UNUSED for v in self.verdicts])

    @property
    def anchors(self) -> Bool[Tensor, " N"]:
        """Units whose row is the old one or close to it."""
        return torch.tensor([v in (UnitVerdict.KEPT, UnitVerdict.MOVED) for v in self.verdicts])


def family_of(spikes: Counts, units: Tensor) -> Counts:
    """Return the observation family restricted to these units."""
    part = copy.deepcopy(spikes)
    for name, value in spikes.named_parameters():
        setattr(part, name, nn.Parameter(value.detach()[units]))
    return part


def with_rows(model: Model, w: Float[Tensor, "N F"]) -> Model:
    """Return a copy of the model with these rows."""
    made = copy.deepcopy(model)
    spikes = made.group("spikes")
    with torch.no_grad():
        spikes.C.copy_(w[:, :-1])
        spikes.b.copy_(w[:, -1])
    return made


class _Bins:
    """Counts of some bins, and latents inferred without the unit itself."""

    def __init__(
        self,
        model: Model,
        y: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        behaviour: Observed | None,
    ) -> None:
        self.model, self.y, self.mask, self.generator = model, y, mask, generator
        self.behaviour = behaviour
        spikes = model.group("spikes")
        assert isinstance(spikes, Counts)
        self.spikes, self.N = spikes, y.shape[1]
        mean = ((y * mask).sum(0) + 0.5) / (mask.sum(0) + 1)
        level = copy.deepcopy(spikes)
        level.start_at(mean)
        self.constant = level.b.detach()
        self._start: tuple[Tensor, Tensor] | None = None  # of the next solve

    def latest(self, bins: int) -> _Bins:
        """Return the latest bins."""
        behaviour = self.behaviour
        if behaviour is not None:
            behaviour = Observed(*(value[-bins:] for value in behaviour))
        return _Bins(self.model, self.y[-bins:], self.mask[-bins:], self.generator, behaviour)

    def latents(self, w: Tensor, used: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the units of each fold, and draws (K, T, n) of latents from those of other folds.

        Args:
            used: (N,) one for units from which latents are inferred, else zero.
        """
        order = torch.randperm(self.N, generator=self.generator)
        folds = [order[f::_FOLDS].sort().values for f in range(min(_FOLDS, self.N))]
        mask = (self.mask * used).repeat(len(folds), 1, 1)
        for f, units in enumerate(folds):
            mask[f, :, units] = 0
        observed = {"spikes": Observed(self.y.repeat(len(folds), 1, 1), mask)}
        if self.behaviour is not None:
            same = (value.repeat(len(folds), 1, 1) for value in self.behaviour)
            observed["kinematics"] = Observed(*same)
        model = with_rows(self.model, w)
        if self._start is None:
            found = prediction.infer_long(
                model, observed, chunk=_CHUNK, solver=_SOLVER, check=False
            )
        else:
            z0, u = (value.repeat(len(folds), *[1] * (value.ndim - 1)) for value in self._start)
            found = prediction.infer(model, observed, solver=_SOLVER, start=(z0, u), check=False)
        self._start = found.z[:, 0].mean(0, keepdim=True), found.u.mean(0, keepdim=True)
        assert found.laplace is not None
        z, covariance = found.z[:, 1:], found.laplace.z_cov[:, 1:]
        factor = torch.linalg.cholesky_ex(covariance)[0].nan_to_num()
        draws = max(1, min(_DRAWS, _DRAWN // len(self.y)))
        noise = torch.randn(draws, *z.shape, 1, generator=self.generator, dtype=z.dtype)
        drawn = z + (factor @ noise).squeeze(-1)
        return [(units, drawn[:, f]) for f, units in enumerate(folds)]

    def evidence(self, units: Tensor, a: Tensor, bins: slice = slice(None)) -> Tensor:
        """Return log p of the counts given affine arguments (K, T, N), relative to a constant."""
        y, mask = self.y[bins][:, units], self.mask[bins][:, units]
        family = family_of(self.spikes, units)
        gained = family.log_p(a, y.expand_as(a)).mean(0)
        gained = gained - family.log_p(self.constant[units].expand_as(y), y)
        return (gained * mask).sum(0)

    def level(self, units: Tensor, a: Tensor) -> Tensor:
        """Return the constant added to the affine arguments that maximises the likelihood."""
        y, mask = self.y[:, units], self.mask[:, units]
        family, c = family_of(self.spikes, units), a.new_zeros(len(units))
        tight = 1 / _ANY_LEVEL**2
        for _ in range(20):
            slope, curve = family.derivatives(a + c, y.expand_as(a))
            down = (slope.mean(0) * mask).sum(0) + tight * c
            step = (down / ((curve.mean(0) * mask).sum(0) + tight)).clamp(-1, 1)
            c = c - step
            if bool((step.abs() < _LEVEL_CLOSE).all()):
                break
        return c

    def fit(
        self,
        units: Tensor,
        z: Tensor,
        prior: RowPrior,
        start: Tensor,
        bins: slice = slice(None),
    ) -> Tensor:
        """Fit rows of the units."""
        y, mask = self.y[bins][:, units], self.mask[bins][:, units]
        family = family_of(self.spikes, units)
        return fit_rows(family, z[:, bins], y, mask, prior.of_units(units), start)

    def held_out(
        self, units: Tensor, z: Tensor, prior: RowPrior, start: Tensor
    ) -> Float[Tensor, " units"]:
        """Return the evidence of rows fitted on each half of the bins, on the other half."""
        half = len(self.y) // 2
        total = z.new_zeros(len(units))
        for fitted, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
            row = self.fit(units, z, prior, start, fitted)
            total += self.evidence(units, affine(z[:, other], row), other)
        return total


def affine(z: Float[Tensor, "K T n"], w: Float[Tensor, "N F"]) -> Float[Tensor, "K T N"]:
    """C z + b."""
    return z @ w[:, :-1].mT + w[:, -1]


@torch.no_grad()
def refit(
    model: Model,
    known: Bool[Tensor, " N"],
    y: Float[Tensor, "T N"],
    mask: Float[Tensor, "T N"],
    like: Float[Tensor, "M n"],
    *,
    behaviour: Observed | None = None,
    start: Rows | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Rows:
    """Fit the rows of all units by a few rounds of EM.

    Args:
        model: float64; the group "spikes" has N units.
        known: units whose rows the model has learnt; the rows of others are ignored.
        y: counts.
        mask: one for observed counts, else zero.
        like: rows of C of other units, for the expected size of a new unit's.
        behaviour: (T, D) observations of the group "kinematics", if known.
        start: rows fitted on a part of the bins; one round on all bins then suffices.
        seed: seed of folds and draws.
    """
    bins = _Bins(model, y, mask, torch.Generator().manual_seed(seed), behaviour)
    spikes = bins.spikes
    n = spikes.C.shape[1]
    first = torch.cat([spikes.C, spikes.b.unsqueeze(1)], 1).detach()
    spread = like.mT @ like / len(like)
    spread = spread + 1e-6 * spread.diagonal().mean().clamp(min=1e-12) * torch.eye(n).to(spread)
    size = torch.linalg.inv(spread)
    fires = (y * mask).sum(0) > 0
    blank = torch.cat([torch.zeros_like(first[:, :n]), bins.constant.unsqueeze(1)], 1)
    if start is None:
        level, anchor = _anchors(bins.latest(_JUDGED), first, known & fires, progress)
        w, used = torch.where(anchor.unsqueeze(1), level, blank), anchor
    else:
        w, used, anchor = start.w, start.used & fires, start.anchors & fires
    anywhere = RowPrior.of(blank, size, _ANY_LEVEL)
    moved, learnt = torch.zeros_like(known), torch.zeros_like(known)
    draw = y.new_zeros(len(y), n)
    rounds = _ROUNDS if start is None else 1
    for done in range(rounds):
        progress("adapt", done, rounds, "rows of the units")
        made, moved, learnt = blank.clone(), torch.zeros_like(anchor), torch.zeros_like(anchor)
        stays_anchor = anchor.clone()
        for units, z in bins.latents(w, used.to(y)):
            draw = z[0]
            found = bins.held_out(units, z, anywhere, w[units])
            kept, row = anchor[units], first[units].clone()
            best = bins.evidence(units, affine(z, row))
            level = row.clone()
            level[:, n] += bins.level(units, affine(z, row))
            levelled = bins.evidence(units, affine(z, level))
            better = levelled > best + _SURE
            row = torch.where(better.unsqueeze(1), level, row)
            best = torch.where(better, levelled, best)
            near = RowPrior.of(first.index_copy(0, units, level), size / _NEAR**2, _LEVEL)
            these = kept.nonzero().flatten()
            nearby = bins.held_out(units[these], z, near, row[these])
            better = nearby > best[these] + _MOVED
            these, nearby = these[better], nearby[better]
            row[these] = bins.fit(units[these], z, near, row[these])
            best[these] = nearby
            kept = kept & ~((found > best + _MOVED) & (levelled < _SHARE * found))
            new = ~kept & (found > _SURE) & fires[units]
            made[units[kept]] = row[kept]
            made[units[new]] = bins.fit(units[new], z, anywhere, w[units[new]])
            stays_anchor[units], learnt[units] = kept, new
            moved[units] = kept & (row != first[units]).any(1)
        w, used, anchor = made, stays_anchor | learnt, stays_anchor
    progress("adapt", rounds, rounds, "rows of the units")
    verdicts = [UnitVerdict.KEPT if kept else UnitVerdict.UNUSED for kept in anchor.tolist()]
    for verdict, these in ((UnitVerdict.MOVED, moved), (UnitVerdict.LEARNT, learnt)):
        for unit in these.nonzero().flatten().tolist():
            verdicts[unit] = verdict
    return Rows(w, tuple(verdicts), draw)


def _anchors(
    bins: _Bins, rows: Float[Tensor, "N F"], known: Bool[Tensor, " N"], progress: Progress
) -> tuple[Float[Tensor, "N F"], Bool[Tensor, " N"]]:
    """Return the rows at the level that fits, and whether they predict the unit."""
    w, anchor = rows.clone(), known
    for done in range(_ROUNDS):
        progress("adapt", done, _ROUNDS, "which units still fit")
        used, anchor = anchor, torch.zeros_like(known)
        for units, z in bins.latents(w, used.to(w)):
            a = affine(z, w[units])
            level = bins.level(units, a)
            w[units, -1] += level
            anchor[units] = bins.evidence(units, a + level) > 0
        anchor &= known
        if bool((anchor == used).all()):
            break
    return w, anchor
