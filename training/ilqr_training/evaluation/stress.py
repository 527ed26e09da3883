"""R2 that decoders lose when units fall silent or bins are lost, on the same bins and draws.

Units fall silent at the first bin of the span: their counts are zero from there on.

- *unannounced*: the model watches its units as the service does (``UnitWatch``) and masks those it
  finds dead after some delay; the baselines receive the zeros.
- *announced*: the model receives a mask. The baselines accept none: they receive zeros and, in
  separate rows, each unit's mean count, which hurts least.

Bins are lost independently. The model predicts them, the Kalman filter skips its update, and the
other baselines receive zeros, the last value or the mean, a row each. Nothing is refitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_training.evaluation.baselines import Baseline, Filling
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.recordings.split import plan_drops, warmup_start
from ilqr_vae.report import Table
from ilqr_vae.report.table import number, once
from ilqr_vae.scoring.metrics import r2
from ilqr_vae.scoring.score import OURS
from ilqr_vae.streaming.ensemble import Horizon

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

CLEAN = "nothing wrong"


@dataclass(frozen=True)
class StressPlan:
    """Which units and bins are lost.

    Attributes:
        silent: share of the units that fall silent; zero for none.
        lost: shares of the bins that are lost.
        draws: of units and of bins, over which R2 is averaged.
        seed: of the first draw; the next draws' are the numbers after it.
    """

    silent: float = 0.25
    lost: tuple[float, ...] = (0.1, 0.3)
    draws: int = 3
    seed: int = 0

    def checked(self) -> StressPlan:
        """Return itself. Raises ConfigError naming the option that is out of range."""
        if not 0 <= self.silent < 1:
            raise ConfigError("--silent", expected="0 or more, below 1", got=str(self.silent))
        for share in self.lost:
            if not 0 < share < 1:
                raise ConfigError("--lost", expected="between 0 and 1", got=str(share))
        if self.draws < 1 or self.seed < 0:
            got = f"{self.draws} and {self.seed}"
            raise ConfigError("--draws, --seed", expected="1 or more, 0 or more", got=got)
        return self


def silent_units(n_units: int, share: float, seed: int) -> NDArray[np.int64]:
    """Draw the units that fall silent: ``share`` of them, rounded."""
    number = round(share * n_units)
    return np.sort(np.random.default_rng(seed).choice(n_units, number, replace=False))


@dataclass(frozen=True)
class StressRow:
    """One decoder under one condition.

    Attributes:
        condition: the fault.
        decoder: name of the decoder.
        given: its replacement for missing counts.
        r2: mean R2 of each draw.
        clean: mean R2 without a fault.
    """

    condition: str
    decoder: str
    given: str
    r2: tuple[float, ...]
    clean: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.r2))

    @property
    def loss(self) -> float:
        """R2 lost."""
        return self.clean - self.mean


@dataclass(frozen=True)
class Stress:
    """Scores under stress.

    Attributes:
        plan: as asked.
        units: of the model.
        rows: in the order of the table.
        watched: statistics of the detection of silent units, by name.
    """

    plan: StressPlan
    units: int
    rows: tuple[StressRow, ...]
    watched: dict[str, float] = field(default_factory=dict[str, float])

    def of(self, condition: str, decoder: str) -> tuple[StressRow, ...]:
        return tuple(r for r in self.rows if r.condition == condition and r.decoder == decoder)

    def share(self, row: StressRow) -> float:
        """Our loss under the row's condition as a share of its own; NaN where it loses nothing."""
        (ours,) = self.of(row.condition, OURS)
        return ours.loss / row.loss if row.loss > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for JSON; NaN is not replaced."""
        return {
            "silent": self.plan.silent,
            "lost": list(self.plan.lost),
            "draws": self.plan.draws,
            "seed": self.plan.seed,
            "units": self.units,
            "watched": self.watched,
            "rows": [
                {
                    "condition": r.condition,
                    "decoder": r.decoder,
                    "given": r.given,
                    "r2": r.mean,
                    "draws": list(r.r2),
                    "clean": r.clean,
                    "loss": r.loss,
                    "our_loss_of_its": 1.0 if r.decoder == OURS else self.share(r),
                }
                for r in self.rows
            ],
        }

    def table(self) -> Table:
        """For terminal and page."""
        text = f"Mean R2 over {self.plan.draws} draws from seed {self.plan.seed}, on the same bins."
        if self.watched:
            w = self.watched
            text += (
                f" Of {w['silent']:.0f} units silent unannounced, {w['found']:.1f} were masked by "
                f"the end, half of those within {w['seconds']:.1f} s; "
                f"{w['wrongly']:.1f} others were masked too."
            )
        return Table(
            "Units silent, bins lost",
            text,
            ("", "decoder", "given", "R2", "R2 lost", "our loss of its"),
            tuple(
                (
                    condition,
                    r.decoder,
                    r.given,
                    number(r.mean),
                    number(r.loss),
                    "" if r.decoder == OURS else number(self.share(r), 2),
                )
                for condition, r in zip(
                    once([r.condition for r in self.rows]), self.rows, strict=True
                )
            ),
            words=3,
        )


class _Bench:
    """Ours and the baselines on the bins [start, stop), scored alike."""

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
        self.clean: dict[str, float] = {}

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

    def row(self, condition: str, decoder: str, given: str, scores: list[float]) -> StressRow:
        clean = self.clean.setdefault(decoder, scores[0])
        return StressRow(condition, decoder, given, tuple(scores), clean)

    def others(
        self, condition: str, given: dict[Filling, str], made: list[tuple[NDArray[Any], Flags]]
    ) -> list[StressRow]:
        """The baselines' rows: counts and what of them is missing, a pair a draw."""
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
    clean: Array | None = None,
    progress: Progress = SILENT,
) -> Stress:
    """Score the model and the baselines under every condition.

    Args:
        estimator: of the model, with its readout.
        recording: all of it, the model's units alone.
        bins: half-open range scored.
        clean: (T, D) our decodes of these bins where nothing is wrong, if they are known.

    Raises:
        ShapeError: no kinematics to score on.
    """
    bench = _Bench(estimator, recording, bins, baselines)
    passes = (0 if clean is not None else 1) + (1 + 2 * plan.draws if plan.silent else 0)
    passes, done = passes + len(plan.lost) * plan.draws, 0

    def ours(what: str, changed: Recording, **options: Any) -> Causal:
        nonlocal done
        progress("stress", done, passes, what)
        done += 1
        return bench.ours(changed, **options)

    decoded = ours(CLEAN, recording).kinematics if clean is None else clean
    rows = [bench.row(CLEAN, OURS, "", [bench.score(decoded)])]
    rows += [bench.row(CLEAN, r.name, "", [bench.score(r.decode(bins))]) for r in baselines]
    watched: dict[str, float] = {}
    if round(plan.silent * recording.n_units):
        found, watched = _silent(bench, plan, ours)
        rows += found
    for share in plan.lost:
        rows += _lost(bench, plan, share, ours)
    progress("stress", passes, passes)
    return Stress(plan, recording.n_units, tuple(rows), watched)


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
    watched_clean = bench.score(watching.kinematics)
    rows = [bench.row(f"{CLEAN}, units watched", OURS, "what it believes", [watched_clean])]
    unannounced, announced = f"{condition}, unannounced", f"{condition}, announced"
    noticed: list[_Noticed] = []
    scores: list[float] = []
    for gone, (counts, _) in zip(units, made, strict=True):
        result = ours(unannounced, replace(recording, counts=counts), watch=True)
        scores.append(bench.score(result.kinematics))
        assert result.masked is not None  # watched
        noticed.append(_Noticed.of(result.masked, gone))
    rows.append(bench.row(unannounced, OURS, "what it believes", scores))
    nothing = [(counts, np.zeros_like(missing)) for counts, missing in made]
    rows += bench.others(unannounced, {"zeros": "zeros", "no update": "zeros"}, nothing)

    scores = []
    for counts, missing in made:
        masked = replace(recording, counts=counts, observed=recording.mask() & ~missing)
        scores.append(bench.score(ours(announced, masked).kinematics))
    rows.append(bench.row(announced, OURS, "the mask", scores))
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
    """Bins until each silent unit that was masked at the end was; and how many others were."""

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
    scores: list[float] = []
    for draw in range(plan.draws):
        dropped = np.zeros(len(recording), dtype=bool)
        dropped[bench.first : stop] = plan_drops(stop - bench.first, share, plan.seed + draw)
        scores.append(bench.score(ours(said, recording, dropped=dropped).kinematics))
        missing = np.broadcast_to(dropped[:, None], recording.counts.shape)
        made.append((recording.counts, missing))
    rows = [bench.row(said, OURS, "missing bins", scores)]
    given: dict[Filling, str] = {
        "no update": "missing bins",
        "zeros": "zeros",
        "last value": "last value",
        "mean": "mean counts",
    }
    return rows + bench.others(said, given, made)
