"""One report of a causal run, as JSON and as a self-contained HTML page.

``replay`` and ``evaluate`` fill a ``ReportData`` with arrays and hand it here. ``to_json`` and the
scores need numpy and scipy alone; ``render_html`` needs the extra ``report`` (matplotlib, jinja2).

>>> scores = score_decodes(recording, spec, bins=(750, 1000), decoded=decoded, std=std)
...                                                             # doctest: +SKIP
>>> path.write_text(render_html(data))                          # doctest: +SKIP
"""

from importlib.util import find_spec
from pathlib import Path

from ilqr_vae.errors import ConfigError
from ilqr_vae.report.data import ReportData, distribution, to_json
from ilqr_vae.report.files import STDOUT, check_writable, write_whole
from ilqr_vae.report.score import Scores, calibration, score_decodes

__all__ = [
    "STDOUT",
    "ReportData",
    "Scores",
    "calibration",
    "check_html",
    "check_writable",
    "distribution",
    "render_html",
    "score_decodes",
    "to_json",
    "write_whole",
]


def check_html(path: Path | None, field: str) -> None:
    """Refuse to promise a page that cannot be made, before the work begins.

    Raises:
        ConfigError: ``path`` cannot be written, or the extra ``report`` is not installed.
    """
    check_writable(path, field)
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if path is not None and missing:
        raise ConfigError(
            field,
            expected="the extra 'report' (pip install 'ilqr-vae[report]')",
            got=f"no {missing[0]}",
        )


def render_html(data: ReportData) -> str:
    """The page. Needs the extra ``report``: see ``check_html``."""
    from ilqr_vae.report.page import render

    return render(data)
