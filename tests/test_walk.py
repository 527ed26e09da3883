"""The README and the tutorials, walked literally: every command and code block runs, in order.

What differs from a user's walk: the recording is short, ``SMALL`` is merged into the configuration
that a page has its reader write, the service listens on free ports, and ``make`` takes its size
from variables of the environment, as it offers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec import toml

from ilqr_training.config import TrainConfig
from ilqr_vae.cli import main
from ilqr_vae.files import to_struct
from process import ENVIRONMENT, served
from tiny import write_config

ROOT = Path(__file__).parents[1]
ADDRESS = "tcp://127.0.0.1:5555"  # as pages write it, and as clients have it by default
CLIENTS = ("replay", "monitor", "closed-loop", "load", "models")
SMALL: dict[str, dict[str, Any]] = {
    "model": {"latents": 4, "inputs": 2},
    "training": {"steps": 6, "batch": 4, "chunk": 15, "validate_every": 3},
    "estimator": {"horizon": 4, "iterations": 2},
    "readout": {"hidden": 0, "recurrent": 0, "lost": []},
}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page that name a language: it, the text, and the prose before."""
    text = page.read_text()
    found = list(re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    ends = [0, *(m.end() for m in found)]
    return [(m[1], m[2], text[end : m.start()]) for m, end in zip(found, ends, strict=False)]


class Walk:
    """Runs the blocks of a page in a folder, its current one.

    Attributes:
        ran: commands that ran.
        made: what each target of ``make`` printed.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._stop: Callable[[], object] = int
        self._ingest = ""
        self.ran: list[str] = []
        self.made: dict[str, str] = {}

    def page(self, page: Path) -> None:
        for language, text, before in blocks(page):
            if language == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    self._command(shlex.split(line, comments=True))
            elif language == "python":
                exec(compile(text.replace(ADDRESS, self._ingest), page.name, "exec"), {})
            elif language == "toml":
                self._configure(Path(re.findall(r"`(\w+\.toml)`", before)[-1]), text)
            else:
                assert language in {"text", "console"}, f"{page.name}: a block of {language}"
        self._stop()

    def _configure(self, path: Path, text: str) -> None:
        written = toml.decode(text)
        to_struct(written, TrainConfig, path.name)
        write_config(path, written, **SMALL)

    def _command(self, words: list[str]) -> None:
        program, *arguments = words
        self.ran.append(arguments[0])
        if program == "make":
            done = subprocess.run(words, cwd=ROOT, env=self._make(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            self.made[arguments[0]] = " ".join(done.stdout.split())
            return
        assert program == "ilqr-vae", words
        if arguments[0] not in CLIENTS:
            self._stop()
        if arguments[0] == "serve":
            model, *options = arguments[1:]
            service = self._stack.enter_context(served(Path(model), Path("log"), *options))
            self._ingest, self._stop = service.ingest, service.stop
            return
        if arguments[0] in CLIENTS:
            arguments = [*arguments, "--to", self._ingest]
        assert main(arguments) == 0, words

    def _make(self) -> dict[str, str]:
        small = write_config(Path("small.toml").absolute(), {}, **SMALL)
        return ENVIRONMENT | {
            "MAKEFLAGS": "--old-file=.venv/.torch --old-file=.venv/.engine",
            "CONFIG": str(small),
            "OUT": str(Path("made here").absolute()),
            "SPEED": "max",
            "DEMO_FLAGS": "--minutes 0.5 --units 12 --reaches 1",
            "PATH": os.environ["PATH"],
        }


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Walk(stack)


@pytest.mark.usefixtures("no_orphans")
def test_the_readme(walk: Walk) -> None:
    assert main(["simulate", "--out", "session.nwb", "--minutes", "1", "--units", "20"]) == 0
    walk.page(ROOT / "README.md")
    assert {"demo", "inspect", "train", "serve", "replay"} <= set(walk.ran)
    assert Path("report.html").exists()
    check_demo(Path("made here"), walk.made["demo"])


def check_demo(out: Path, said: str) -> None:
    """What ``make demo`` made, and said."""
    report = json.loads((out / "report.json").read_text())
    assert report["bins"] == 150
    assert report["speed"] is None
    assert set(report["scores"]) == {"iLQR-VAE", "Wiener filter", "Kalman filter", "GRU"}
    assert report["latency_ms"]["total"]["n"] > 0
    assert json.loads((out / "closed-loop.json").read_text())["kind"] == "closed-loop"
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Content-Security-Policy" in page
    assert not re.search(r"(src|href)=.https?:", page)
    assert re.search(r"let things go wrong: http://127\.0\.0\.1:\d+/", said)  # a page, ended by now
    for verb in ("simulate", "train", "serve", "replay", "closed-loop"):
        assert f"$ ilqr-vae {verb} " in said
    summary = said.partition("service stopped")[2]
    for word in ("Causal decodes", "mean R2", "90 % covers", "p99.9", "statuses", "report.html"):
        assert word in summary


def test_the_tutorials(walk: Walk) -> None:
    for page in ("recording", "closed-loop", "journal"):
        walk.page(ROOT / "docs" / "tutorial" / f"{page}.md")
    assert {"evaluate", "monitor", "closed-loop", "export", "verify"} <= set(walk.ran)
    made = {"offline.html", "report.html", "report.json", "loop.json", "monday.nwb"}
    assert made <= {path.name for path in Path().iterdir()}
