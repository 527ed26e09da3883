"""One report of a causal run, as JSON and as a self-contained HTML page.

``replay`` and ``evaluate`` fill a ``ReportData`` with arrays and hand it here. ``to_json`` and the
scores need numpy and scipy alone; ``render_html`` needs the extra ``report`` (matplotlib, jinja2).

>>> scores = score_decodes(recording, spec, bins=(750, 1000), decoded=decoded, std=std)
...                                                             # doctest: +SKIP
>>> path.write_text(render_html(data))                          # doctest: +SKIP
"""

from ilqr_vae.report.data import ReportData, distribution, to_json
from ilqr_vae.report.files import check_writable, write_whole
from ilqr_vae.report.score import Scores, calibration, score_decodes

__all__ = [
    "ReportData",
    "Scores",
    "calibration",
    "check_writable",
    "distribution",
    "render_html",
    "score_decodes",
    "to_json",
    "write_whole",
]


def render_html(data: ReportData) -> str:
    """The page. Raises ConfigError where the extra ``report`` is not installed."""
    from ilqr_vae.errors import ConfigError

    try:
        from ilqr_vae.report.page import render
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "--html",
            expected="the extra 'report' (pip install 'ilqr-vae[report]')",
            got=f"no {missing.name}",
        ) from missing
    return render(data)
