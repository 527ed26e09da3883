"""The one progress bar, at the width of a small terminal."""

from __future__ import annotations

import io

from rich.console import Console

from ilqr_vae.progress import SILENT, Bar

NOTE = "bound -123.4 nats/bin, KL 12.34, R2 0.123"


def test_bars_fit_80_columns_and_disappear() -> None:
    written = io.StringIO()
    screen = Console(file=written, width=80, force_terminal=True, color_system=None)
    with Bar(screen) as bar:
        bar("training", 1999, 2000, NOTE)
        shown = screen.render_lines(bar.renderable)
        (alone,) = ["".join(part.text for part in line) for line in shown]
        assert NOTE in alone
        assert "1999/2000" in alone
        bar("latents, validation", 5, 100)
        lines = ["".join(p.text for p in line) for line in screen.render_lines(bar.renderable)]
        assert len(lines) == 2
        assert all(len(line) <= 80 for line in lines)
        bar("latents, validation", 100, 100)
        bar("training", 2000, 2000)
        assert not bar.renderable.row_count
        bar.log("step 4: best so far")
    assert "step 4: best so far" in written.getvalue()


def test_silence_takes_anything() -> None:
    SILENT("training", 1, 2, NOTE)
    SILENT.log("a line")
