"""Names are data: whatever they are, they are shown as they are and overwrite nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from ilqr_vae import terminal
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.progress import Bar
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.report import ReportData, render_html
from ilqr_vae.scoring.score import score_decodes
from rig import write_recording
from tiny import config, write_config

ODD = ("vx [/s]", "vy [bold red]:x:", "[cm/s]", "\\[x]", "$\\frac{v}$", "v<b>&amp;</b>", "速度 ±")


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = terminal.console(width=80)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    screen.print(f"channel {name}")
    screen.print(table)
    out = capsys.readouterr().out
    assert f"channel {name}\n" in out
    assert out.count(name) == 4


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202eab", "\\u202eab"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_does_not_print_is_shown_as_an_escape(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.console(width=80).print(f"unit {name}.")
    assert capsys.readouterr().out == f"unit {shown}.\n"


def test_a_bar_takes_no_name_for_markup() -> None:
    with Bar(terminal.console(stderr=True)) as bar:
        bar("vx [/s]", 1, 2, "[/]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with brackets in its name, and a model of channels with units in brackets."""
    folder = tmp_path_factory.mktemp("rat") / "rat [left] [/s]"
    folder.mkdir(parents=True)  # the last name is "s]"
    recording = write_recording(folder / "reach [1].mat", n_units=5)
    settings = config(steps=2, validate_every=0)
    mat = {"kinematic_names": ["vx [/s]", "vy [cm/s]"]}
    path = write_config(folder / "c.toml", settings)
    text = path.read_text().replace('["vx","vy"]', json.dumps(mat["kinematic_names"]))
    path.write_text(text)
    assert (
        main(
            [
                "train",
                str(path),
                "--recording",
                str(recording),
                "--out",
                str(folder / "m.safetensors"),
            ]
        )
        == 0
    )
    return folder


def test_brackets_in_names_and_paths_are_shown(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained / "m.safetensors"
    assert load_artifact(model).manifest.kinematic_names == ("vx [/s]", "vy [cm/s]")
    assert main(["inspect", str(model)]) == 0
    assert "vx [/s] (m/s), vy [cm/s] (m/s)" in capsys.readouterr().out
    page = trained / "page.html"
    recording = trained / "reach [1].mat"
    arguments = ["evaluate", str(model), "--recording", str(recording), "--html", str(page)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Offline causal evaluation on reach [1].mat" in out
    assert "r2.vx [/s]" in out
    assert "vy [cm/s]" in page.read_text()


def test_a_path_that_is_not_there_is_shown_whole(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = trained / "gone [/b]\n.mat"
    assert main(["evaluate", str(trained / "m.safetensors"), "--recording", str(gone)]) == 2
    assert "gone [/b]\\n.mat" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_every_word_fits_an_ascii_terminal(trained: Path, verb: str) -> None:
    options = ["--recording", str(trained / "reach [1].mat")] if verb == "evaluate" else []
    done = subprocess.run(
        [sys.executable, "-m", "ilqr_vae.cli", verb, str(trained / "m.safetensors"), *options],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    assert b"vx [/s]" in done.stdout


def test_standard_output_takes_what_its_encoding_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.any_encoding()
    print("± 速")
    sys.stdout.flush()
    assert raw.getvalue() == b"+- \\u901f\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("v$x_{$", "v$x_{$"),
        ("<b>&x</b>", "&lt;b&gt;&amp;x&lt;/b&gt;"),
        ("#010203", "#010203"),
        ("url(#a", "url(#a"),
        ("a\nb\x1b[31m\0", "a\\nb\\x1b[31m\\x00"),
        ("速度😀", "速度😀"),
        ("{{ 1 + 1 }}", "{{ 1 + 1 }}"),
    ],
)
def test_a_name_is_shown_in_pictures_and_tables_of_a_page(name: str, shown: str) -> None:
    page = page_of(name)
    assert page.count(shown) >= 4  # time course, agreement, residuals, scores
    assert "\x1b" not in page
    assert "\0" not in page


def test_a_very_long_name_leaves_a_picture_its_room() -> None:
    page = page_of("v" * 5000)
    assert page.count("v" * 5000) == 5  # whole in title, heading, and head and rows of the table
    assert f"{'v' * 31}…" in page


def page_of(name: str) -> str:
    """A page on one channel of that name and that unit."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 1))
    recording = Recording(
        counts=rng.poisson(1.0, (200, 3)).astype(np.uint16),
        bin_width=0.05,
        unit_names=("a", "b", "c"),
        kinematics=truth,
        kinematic_names=(name,),
        kinematic_units=("m/s",),
    )
    decoded = truth + rng.normal(size=truth.shape)
    scores = score_decodes(
        recording, SplitSpec(), bins=(0, 200), decoded=decoded, std=np.ones((200, 1))
    )
    return render_html(
        ReportData(
            title=name,
            kind="evaluate",
            bin_width=0.05,
            start=0.0,
            counts=recording.counts,
            status=("ok",) * 200,
            latents=rng.normal(size=(200, 2)),
            names=(name,),
            units=("m/s",),
            truth=truth,
            decoded=decoded,
            scores=scores,
        )
    )
