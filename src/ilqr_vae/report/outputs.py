"""The output files of a causal run: numbers, a page, all answers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.report.analyses import psths, residuals, summary, triggered_inputs
from ilqr_vae.report.data import SCHEMA, Reaches, ReportData, distribution, plain
from ilqr_vae.report.table import Table


def check_html(path: Path | None, field: str) -> None:
    """Check that a page can be written, before the work begins.

    Raises:
        ConfigError: ``path`` cannot be written, or the extra ``report`` is not installed.
    """
    check_writable(path, field)
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if path is not None and missing:
        raise ConfigError(
            field,
            expected="the extra 'report' (pip install '.[report]')",
            got=f"no {missing[0]}",
        )


def render_html(data: ReportData) -> str:
    """The page. Needs the extra ``report``: see ``check_html``."""
    from ilqr_vae.report.page import render

    return render(data)


def render_tables(title: str, facts: Mapping[str, str], tables: tuple[Table, ...]) -> str:
    """A page of tables. Needs the extra ``report``: see ``check_html``."""
    from ilqr_vae.report.page import render_tables

    return render_tables(title, facts, tables, {})


def picture_of(data: ReportData) -> bytes | None:
    """A PNG of the run at a glance; None where nothing is decoded. Needs the extra ``report``."""
    from ilqr_vae.report.figures import picture

    made, buffer = picture(data), io.BytesIO()
    if made is None:
        return None
    made.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def add_cursor(path: Path, cursor: Mapping[str, Reaches], radius: float) -> None:
    """Put the section of a closed loop into a report's page.

    Args:
        cursor: reaches, by what moved the cursor.
        radius: metres, of a target.

    Raises:
        ConfigError: the file cannot be read or written, or is no report without such a section.
    """
    from ilqr_vae.report.page import with_cursor

    try:
        page = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("report", expected="a page that replay wrote", got=str(error)) from error
    write_whole(path, with_cursor(page, cursor, radius))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Paths of ``--json``, ``--html``, ``--arrays`` and ``--picture``; None if not requested."""

    json_file: Path | None
    html_file: Path | None
    arrays_file: Path | None
    picture_file: Path | None = None

    def check(self) -> None:
        """Check that all outputs can be written. Raises ConfigError."""
        check_html(self.html_file, "--html")
        check_html(self.picture_file, "--picture")
        for option, path in {"--json": self.json_file, "--arrays": self.arrays_file}.items():
            check_writable(path, option)

    def write(self, report: ReportData, arrays: dict[str, NDArray[Any]]) -> None:
        """Write the requested outputs; all are rendered before any is written.

        Raises:
            ConfigError: a folder cannot be written.
        """
        made: list[tuple[Path, str | bytes]] = []
        if self.json_file is not None:
            made.append((self.json_file, json.dumps(to_json(report), indent=2) + "\n"))
        if self.html_file is not None:
            made.append((self.html_file, render_html(report)))
        if self.arrays_file is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **arrays)
            made.append((self.arrays_file, buffer.getvalue()))
        if self.picture_file is not None and (png := picture_of(report)) is not None:
            made.append((self.picture_file, png))
        for path, content in made:
            write_whole(path, content)


def _bound(data: ReportData, stage: str) -> dict[str, float]:
    known = stage in data.latency_uncertainty_ms
    return {"clock_uncertainty": data.latency_uncertainty_ms[stage]} if known else {}


def to_json(data: ReportData) -> dict[str, Any]:
    """The report's numbers, ready for ``json.dumps``; NaN becomes null."""
    scores = data.scores
    return plain(
        {
            "schema": SCHEMA,
            "kind": data.kind,
            "title": data.title,
            "bins": len(data.counts),
            "bin_width": data.bin_width,
            "bits_per_spike": data.bits_per_spike,
            "scores": {} if scores is None else scores.methods,
            "scored_bins": 0 if scores is None else scores.n,
            "intervals_95": {} if scores is None else scores.intervals,
            "resampled": "" if scores is None else scores.resampled,
            "calibration": {}
            if scores is None
            else {"nominal": scores.nominal, "actual": scores.actual},
            "coverage_90_by_speed": {}
            if scores is None or scores.by_speed is None
            else asdict(scores.by_speed),
            "coverage_90_by_decoded_speed": {}
            if scores is None or scores.by_decoded_speed is None
            else asdict(scores.by_decoded_speed),
            "classes": None if data.classes is None else asdict(data.classes),
            "statuses": data.statuses,
            "events": [{"seconds": t, "name": name} for t, name in data.events],
            "latency_ms": {
                k: distribution(v) | _bound(data, k) for k, v in data.latency_ms.items()
            },
            "deadline_ms": data.deadline_ms,
            "residuals": summary(residuals(data)),
            "psth": summary(psths(data)),
            "inputs": [summary(found) for found in triggered_inputs(data)],
            "learning": {name: [list(point) for point in c] for name, c in data.learning.items()},
            "notes": data.notes,
            "warnings": [asdict(warning) for warning in data.warnings],
            "provenance": data.provenance,
            **data.extra,
        }
    )
