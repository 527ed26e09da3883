"""Results of ``evaluation.stress``: scores and intervals under each condition, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ilqr_vae.errors import ConfigError
from ilqr_vae.report import Table
from ilqr_vae.report.table import number, once, percent
from ilqr_vae.scoring.score import OURS, BySpeed


@dataclass(frozen=True)
class StressPlan:
    """Which units and bins are lost.

    Attributes:
        silent: share of the units that fall silent; zero for none.
        lost: shares of the bins that are lost.
        draws: number of random draws over which R2 is averaged.
        seed: seed of the first draw; later draws use consecutive seeds.
    """

    silent: float = 0.25
    lost: tuple[float, ...] = (0.1, 0.3)
    draws: int = 3
    seed: int = 0

    def checked(self) -> StressPlan:
        """Return itself. Raises ConfigError naming an option that is out of range."""
        if not 0 <= self.silent < 1:
            raise ConfigError("--silent", expected="0 or more, below 1", got=str(self.silent))
        for share in self.lost:
            if not 0 < share < 1:
                raise ConfigError("--lost", expected="between 0 and 1", got=str(share))
        if self.draws < 1 or self.seed < 0:
            got = f"{self.draws} and {self.seed}"
            raise ConfigError("--draws, --seed", expected="1 or more, 0 or more", got=got)
        return self


@dataclass(frozen=True)
class StressRow:
    """One decoder under one condition.

    Attributes:
        condition: the fault.
        decoder: name of the decoder.
        given: what it receives for missing counts.
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
class StressIntervals:
    """The model's 90 % intervals under one condition, over the bins of all draws.

    Attributes:
        condition: the fault.
        coverage: share of the true values inside the interval.
        by_decoded_speed, by_speed: the same by quarter of decoded and of true speed.
    """

    condition: str
    coverage: float
    by_decoded_speed: BySpeed
    by_speed: BySpeed


@dataclass(frozen=True)
class Stress:
    """Scores under stress.

    Attributes:
        plan: the conditions.
        units: number of units of the model.
        rows: in the order of the table.
        watched: statistics of the detection of silent units, by name.
        intervals: intervals of the model, one row per condition.
    """

    plan: StressPlan
    units: int
    rows: tuple[StressRow, ...]
    watched: dict[str, float] = field(default_factory=dict[str, float])
    intervals: tuple[StressIntervals, ...] = ()

    def of(self, condition: str, decoder: str) -> tuple[StressRow, ...]:
        return tuple(r for r in self.rows if r.condition == condition and r.decoder == decoder)

    def share(self, row: StressRow) -> float:
        """Return our loss as a share of this decoder's; NaN if it loses nothing."""
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
            "intervals": [
                {
                    "condition": i.condition,
                    "coverage_90": i.coverage,
                    **{
                        name: {"upto": by.upto, "coverage": by.coverage, "ratio": by.ratio}
                        for name, by in (
                            ("by_decoded_speed", i.by_decoded_speed),
                            ("by_speed", i.by_speed),
                        )
                    },
                }
                for i in self.intervals
            ],
        }

    def intervals_table(self) -> Table:
        """Return the intervals as a table."""

        def each(by: BySpeed) -> tuple[str, str]:
            return (
                ", ".join(number(100 * share, 1) for share in by.coverage),
                ", ".join(number(ratio, 2) for ratio in by.ratio),
            )

        return Table(
            "Intervals, units silent, bins lost",
            "Of the 90 % intervals, in quarters of speed, slowest first; the bins of all draws "
            "together. Covered in %; ratio: stated over actual error.",
            ("", "covers", "by decoded speed", "ratio", "by true speed", "ratio"),
            tuple(
                (i.condition, percent(i.coverage), *each(i.by_decoded_speed), *each(i.by_speed))
                for i in self.intervals
            ),
        )

    def table(self) -> Table:
        """Return the scores as a table."""
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
