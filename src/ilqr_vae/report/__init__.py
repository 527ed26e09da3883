"""One report of a causal run, as JSON and as a self-contained HTML page.

``replay`` and ``evaluate`` fill a ``ReportData`` with arrays. ``to_json`` and the scores need only
numpy and scipy; ``render_html`` needs the extra ``report`` (matplotlib, jinja2).

>>> scores = score_decodes(recording, spec, bins=(750, 1000), decoded=decoded, std=std)
...                                                             # doctest: +SKIP
>>> path.write_text(render_html(data))                          # doctest: +SKIP
"""

from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.report.data import Reaches, ReportData, distribution
from ilqr_vae.report.outputs import Outputs, add_cursor, check_html, render_html, to_json
from ilqr_vae.report.table import Table
from ilqr_vae.scoring.score import Scores, calibration, score_decodes

__all__ = [
    "STDOUT",
    "Outputs",
    "Reaches",
    "ReportData",
    "Scores",
    "Table",
    "add_cursor",
    "calibration",
    "check_folder",
    "check_html",
    "check_writable",
    "distribution",
    "render_html",
    "score_decodes",
    "to_json",
    "write_whole",
]
