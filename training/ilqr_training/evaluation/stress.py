"""R2 that decoders lose when units fall silent or bins are lost.

All decoders are scored on the same bins and random draws. Units fall silent at the first bin of the
span: their counts are zero from then on.

- *unannounced*: the model watches its units as the service does (``UnitWatch``) and masks, after a
  delay, those that it finds dead; the baselines receive the zeros.
- *announced*: the model receives a mask. The baselines accept none: they receive zeros or, in
  separate rows, each unit's mean count, which costs least.

Bins are lost independently. The model predicts them, the Kalman filter skips its update, and the
other baselines receive zeros, the last value or the mean, in separate rows. Nothing is refitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_training.evaluation.baselines import Baseline, Filling
from ilqr_training.evaluation.stress_scores import Stress, StressIntervals, StressPlan, StressRow
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.errors import ShapeError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.recordings.split import plan_drops, varies, warmup_start
from ilqr_vae.scoring.metrics import interval_coverage, r2
from ilqr_vae.scoring.score import OURS, coverage_by_speed
from ilqr_vae.streaming.ensemble import Horizon

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

CLEAN = "nothing wrong"


def silent_units(n_units: int, share: float, seed: int) -> NDArray[np.int64]:
    """Draw the units that fall silent: ``share`` of them, rounded."""
    number = round(share * n_units)
    return np.sort(np.random.default_rng(seed).choice(n_units, number, replace=False))


class _Bench:
    """The model and the baselines, scored alike on the bins [start, stop)."""

    def __init__(
        self,
        estimator: Horizon,
        recording: Recording,
        bins: tuple[int, int],
        baselines: tuple[Baseline, ...],
    ) -> None:
        if recording.kinematics is None:
            raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
        self.estimator, self.recording, self.bins = estimator, recording, bins
        self.baselines, self.first = baselines, warmup_start(bins[0])
        part = slice(*bins)
        self.truth, self.scored = recording.kinematics[part], recording.scored[part]
        self.live = np.flatnonzero(varies(recording.kinematics))
        self.clean: dict[str, float] = {}
        self.intervals: list[StressIntervals] = []

    def score(self, decoded: Array) -> float:
        return r2(self.truth[self.scored], decoded[self.scored])

    def ours(
        self, recording: Recording, *, dropped: Flags | None = None, watch: bool = False
    ) -> Causal:
        start, stop = self.bins
        run_in = start - self.first
        return causal_pass(
            self.estimator, recording, start, stop, run_in=run_in, dropped=dropped, watch=watch
        )

    def ours_row(self, condition: str, given: str, results: list[Causal]) -> StressRow:
        """Return the model's row from one result per draw, and keep its intervals."""
        if len(self.live):
            kept = np.ix_(self.scored, self.live)
            truth, decoded, std = (
                np.concatenate([x[kept] for x in each])
                for each in zip(
                    *((self.truth, r.kinematics, r.kinematics_std) for r in results), strict=True
                )
            )
            units = tuple(self.recording.kinematic_units[i] for i in self.live)
            self.intervals.append(
                StressIntervals(
                    condition,
                    interval_coverage(truth, decoded, std, 0.9),
                    coverage_by_speed(truth, decoded, std, units, "decoded"),
                    coverage_by_speed(truth, decoded, std, units),
                )
            )
        return self.row(condition, OURS, given, [self.score(r.kinematics) for r in results])

    def row(self, condition: str, decoder: str, given: str, scores: list[float]) -> StressRow:
        clean = self.clean.setdefault(decoder, scores[0])
        return StressRow(condition, decoder, given, tuple(scores), clean)

    def others(
        self, condition: str, given: dict[Filling, str], made: list[tuple[NDArray[Any], Flags]]
    ) -> list[StressRow]:
        """Return the baselines' rows from counts and missing entries, one pair per draw."""
        rows: list[StressRow] = []
        for baseline in self.baselines:
            for filling, words in given.items():
                if filling not in (*baseline.fillings, "mean"):
                    continue
                scores = [
                    self.score(baseline.decode(self.bins, counts=c, missing=m, filling=filling))
                    for c, m in made
                ]
                rows.append(self.row(condition, baseline.name, words, scores))
        return rows


def under_stress(
    estimator: Horizon,
    recording: Recording,
    bins: tuple[int, int],
    baselines: tuple[Baseline, ...],
    plan: StressPlan,
    *,
    clean: Causal | None = None,
    progress: Progress = SILENT,
) -> Stress:
    """Score the model and the baselines under every condition.

    Args:
        estimator: estimator of the model, with its readout.
        recording: the whole recording, with only the model's units.
        bins: half-open range to score.
        clean: the model's estimates of these bins without faults, if known.

    Raises:
        ShapeError: there are no kinematics to score on.
    """
    bench = _Bench(estimator, recording, bins, baselines)
    passes = (0 if clean is not None else 1) + (1 + 2 * plan.draws if plan.silent else 0)
    passes, done = passes + len(plan.lost) * plan.draws, 0

    def ours(what: str, changed: Recording, **options: Any) -> Causal:
        nonlocal done
        progress("stress", done, passes, what)
        done += 1
        return bench.ours(changed, **options)

    rows = [bench.ours_row(CLEAN, "", [clean or ours(CLEAN, recording)])]
    rows += [bench.row(CLEAN, r.name, "", [bench.score(r.decode(bins))]) for r in baselines]
    watched: dict[str, float] = {}
    if round(plan.silent * recording.n_units):
        found, watched = _silent(bench, plan, ours)
        rows += found
    for share in plan.lost:
        rows += _lost(bench, plan, share, ours)
    progress("stress", passes, passes)
    return Stress(plan, recording.n_units, tuple(rows), watched, tuple(bench.intervals))


def _silent(
    bench: _Bench, plan: StressPlan, ours: Callable[..., Causal]
) -> tuple[list[StressRow], dict[str, float]]:
    recording, (start, stop) = bench.recording, bench.bins
    condition = f"{100 * plan.silent:g} % of units silent"
    units = [
        silent_units(recording.n_units, plan.silent, plan.seed + draw) for draw in range(plan.draws)
    ]
    made: list[tuple[NDArray[Any], Flags]] = []
    for gone in units:
        counts, missing = recording.counts.copy(), np.zeros(recording.counts.shape, dtype=bool)
        counts[start:stop, gone], missing[start:stop, gone] = 0, True
        made.append((counts, missing))

    watching = ours("units watched, none silent", recording, watch=True)
    rows = [bench.ours_row(f"{CLEAN}, units watched", "what it believes", [watching])]
    unannounced, announced = f"{condition}, unannounced", f"{condition}, announced"
    noticed: list[_Noticed] = []
    results: list[Causal] = []
    for gone, (counts, _) in zip(units, made, strict=True):
        result = ours(unannounced, replace(recording, counts=counts), watch=True)
        results.append(result)
        assert result.masked is not None  # watched
        noticed.append(_Noticed.of(result.masked, gone))
    rows.append(bench.ours_row(unannounced, "what it believes", results))
    nothing = [(counts, np.zeros_like(missing)) for counts, missing in made]
    rows += bench.others(unannounced, {"zeros": "zeros", "no update": "zeros"}, nothing)

    results = [
        ours(announced, replace(recording, counts=counts, observed=recording.mask() & ~missing))
        for counts, missing in made
    ]
    rows.append(bench.ours_row(announced, "the mask", results))
    rows += bench.others(announced, {"zeros": "zeros", "no update": "zeros"}, nothing)
    rows += bench.others(announced, {"mean": "mean counts"}, made)
    bins = np.concatenate([n.after for n in noticed])
    return rows, {
        "silent": float(len(units[0])),
        "found": float(np.mean([len(n.after) for n in noticed])),
        "wrongly": float(np.mean([n.wrongly for n in noticed])),
        "seconds": float(np.median(bins)) * recording.bin_width if len(bins) else float("nan"),
    }


@dataclass(frozen=True)
class _Noticed:
    """Return the delay of each silent unit masked by the end, and the number of others masked."""

    after: NDArray[np.int64]
    wrongly: int

    @staticmethod
    def of(masked: Flags, gone: NDArray[np.int64]) -> _Noticed:
        found = masked[:, gone][:, masked[-1, gone]]
        others = np.setdiff1d(np.arange(masked.shape[1]), gone)
        since = len(found) - np.argmax(~found[::-1], axis=0)
        return _Noticed(np.where(found.all(0), 0, since), int(masked[:, others].any(0).sum()))


def _lost(
    bench: _Bench, plan: StressPlan, share: float, ours: Callable[..., Causal]
) -> list[StressRow]:
    recording, (_, stop) = bench.recording, bench.bins
    said = f"{100 * share:g} % of bins lost"
    made: list[tuple[NDArray[Any], Flags]] = []
    results: list[Causal] = []
    for draw in range(plan.draws):
        dropped = np.zeros(len(recording), dtype=bool)
        dropped[bench.first : stop] = plan_drops(stop - bench.first, share, plan.seed + draw)
        results.append(ours(said, recording, dropped=dropped))
        missing = np.broadcast_to(dropped[:, None], recording.counts.shape)
        made.append((recording.counts, missing))
    rows = [bench.ours_row(said, "missing bins", results)]
    given: dict[Filling, str] = {
        "no update": "missing bins",
        "zeros": "zeros",
        "last value": "last value",
        "mean": "mean counts",
    }
    return rows + bench.others(said, given, made)
