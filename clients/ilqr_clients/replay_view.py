"""The terminal view of a running replay, drawn only while no bin has to wait for it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ilqr_clients.connection import Closing
from ilqr_clients.stream import StreamLog
from ilqr_vae.report.table import number
from ilqr_vae.scoring.metrics import r2, r2_per_axis
from ilqr_vae.terminal import visible

STYLES = {
    "ok": "green",
    "degraded": "yellow",
    "late": "red",
    "missing": "bright_black",
    "extrapolated": "magenta",
}


def status_text(statuses: dict[str, int]) -> Text:
    """Return coloured text such as ``ok 120  missing 4``; ``-`` if there are none."""
    parts = [
        Text.assemble((visible(k), STYLES.get(k, "white")), f" {v}")
        for k, v in statuses.items()
        if v
    ]
    return Text("  ").join(parts) if parts else Text("-")


class LiveReplay(Closing):
    """A ``watch`` for ``stream.stream``: a table, redrawn at most four times a second.

    It is drawn while the next send is further away than drawing takes, and at least once a second,
    so that it does not freeze at high speeds.

    Args:
        total: bins in the stream; the first ``warm_up`` are not scored.
        truth: (T, D) kinematics of the whole stream, or None; ``scored`` (T,) marks the bins that
            count.
        names: of the D channels.
        rows: the row of ``truth`` of each bin so far; None where they are the same.
        enabled: if false, nothing is drawn.
    """

    def __init__(
        self,
        console: Console,
        *,
        total: int,
        warm_up: int,
        truth: NDArray[np.float64] | None,
        scored: NDArray[np.bool_],
        names: tuple[str, ...],
        enabled: bool,
        rows: list[int] | None = None,
    ) -> None:
        self._rows = rows
        self._total, self._warm_up, self._truth, self._names = total, warm_up, truth, names
        self._scored = scored
        self._live = Live(console=console, auto_refresh=False) if enabled else None
        self._drawn = time.monotonic()
        self._cost = 0.01

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def close(self) -> None:
        """Stop drawing; the last table stays on the screen."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, log: StreamLog, free: float) -> None:
        if self._live is None:
            return
        now = time.monotonic()
        since = now - self._drawn
        if not (free == float("inf") or since > 1.0 or (since > 0.25 and free > 2 * self._cost)):
            return
        self._live.update(self.table(log), refresh=True)
        self._drawn = time.monotonic()
        self._cost = 0.5 * self._cost + 0.5 * (self._drawn - now)

    def table(self, log: StreamLog) -> Table:
        """Return the current table."""
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        elapsed = max(1e-9, ((log.ended_ns or time.monotonic_ns()) - log.started_ns) / 1e9)
        warm = " (warming up)" if log.answered <= self._warm_up else ""
        table.add_row(
            "bins",
            f"{log.answered} of {self._total}{warm}, {log.answered / elapsed:.1f} per second",
        )
        table.add_row("statuses", status_text(Counter(s for s in log.status if s)))
        rows = slice(self._warm_up, None)
        if self._truth is not None and self._names:
            bins = np.arange(len(self._truth)) if self._rows is None else np.array(self._rows)
            bins = bins[: log.n_bins].astype(np.int64)
            decoded = log.kinematics[: len(bins)]
            known = np.isfinite(decoded).all(axis=1) & self._scored[bins]
            known[: self._warm_up] = False
            if known.sum() > 1:
                pair = self._truth[bins][known], decoded[known]
                each = r2_per_axis(*pair)
                text = "  ".join(
                    f"{n} {number(float(v))}" for n, v in zip(self._names, each, strict=True)
                )
                table.add_row("R2 so far", f"{text}  mean {number(r2(*pair))}")
        latency = log.latency_ms(rows)
        for stage in ("solve", "total"):
            values = latency[stage][np.isfinite(latency[stage])]
            if values.size:
                p50, p99 = np.percentile(values, [50, 99])
                table.add_row(f"{stage}, ms", f"p50 {p50:.2f}  p99 {p99:.2f}")
        table.add_row("bits per spike", number(log.bits_per_spike(rows)))
        return table
