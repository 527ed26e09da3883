"""The terminal view of a running replay, drawn only while no bin is delayed by it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ilqr_clients.connection import Closing
from ilqr_clients.stream import StreamLog
from ilqr_vae.report.table import Section, lines_of, milliseconds, number
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

    It is drawn if that takes less time than is left until the next send, and at least once a
    second, so that it does not freeze at high speeds.

    Args:
        total: bins in the stream; the first ``warm_up`` are not scored.
        truth: (T, D) kinematics of the whole stream, or None; ``scored`` (T,) marks the bins that
            count.
        names: of the D channels.
        rows: row of ``truth`` for each bin so far; None if they are the same.
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
        self._scored, self._width = scored, console.width
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

    def table(self, log: StreamLog) -> Text:
        """Return the current view, one line per name."""
        elapsed = max(1e-9, ((log.ended_ns or time.monotonic_ns()) - log.started_ns) / 1e9)
        warm = " (warming up)" if log.answered <= self._warm_up else ""
        count = f"{log.answered} of {self._total}{warm}, {log.answered / elapsed:.1f} per second"
        rows = [("bins", count)]
        scored = slice(self._warm_up, None)
        if self._truth is not None and self._names:
            bins = np.arange(len(self._truth)) if self._rows is None else np.array(self._rows)
            bins = bins[: log.n_bins].astype(np.int64)
            decoded = log.kinematics[: len(bins)]
            known = np.isfinite(decoded).all(axis=1) & self._scored[bins]
            known[: self._warm_up] = False
            if known.sum() > 1:
                pair = self._truth[bins][known], decoded[known]
                each = zip(self._names, r2_per_axis(*pair), strict=True)
                text = "; ".join(f"{visible(n)} {number(float(v))}" for n, v in each)
                rows.append(("R2 so far", f"mean {number(r2(*pair))}; {text}"))
        latency = log.latency_ms(scored)
        for stage in ("solve", "total"):
            values = latency[stage][np.isfinite(latency[stage])]
            if values.size:
                p50, p99 = (milliseconds(q) for q in np.percentile(values, [50, 99]))
                rows.append((f"{stage} (ms)", f"p50 {p50}; p99 {p99}"))
        rows.append(("bits per spike", number(log.bits_per_spike(scored))))
        lines = lines_of((Section("", tuple(rows)),), self._width)[1:]
        statuses = Text("  statuses  ") + status_text(Counter(s for s in log.status if s))
        return Text("\n").join([statuses, *(Text(line) for line in lines)])
